"""The models that this router serves: by their names and aliases, each with all that it takes to serve it."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.errors import ModelNotFound, Unavailable
from baton.settings import ModelSettings, RouterSettings
from router.admission.tenants import Tenant
from router.generation import Generator
from router.metrics import ModelMetrics
from router.model_facts import ModelFacts
from router.text.prompts import PromptEncoder
from router.text.tokenizer import TextThreads, Tokenizer
from router.upstream import Upstream

NAMES_TOLD_MAX = 10
"""Of the models served, in a sentence."""
NAME_CHARACTERS_MAX = 200


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """One model, and how it is served."""

    name: str
    """The one that its workers announce; also its label in metrics."""
    aliases: tuple[str, ...]
    tokenizer: Tokenizer
    prompts: PromptEncoder
    generator: Generator
    context_length_max: int
    """0: the model's own limit."""
    upstream: Upstream | None

    @property
    def is_ready(self) -> bool:
        """Whether a worker here could take a request now."""
        try:
            self.facts()
        except Unavailable:
            return False
        return True

    def facts(self) -> ModelFacts:
        """Raises Unavailable while no decode worker is ready: only they know."""
        return self.generator.facts().limited(self.context_length_max, "the context that this server gives the model")


class Catalog:
    def __init__(self, models: Iterable[ServedModel]) -> None:
        """At least one model; no name or alias twice, which RouterSettings sees to."""
        self._models = tuple(models)
        self._by_name = {name: model for model in self._models for name in (model.name, *model.aliases)}

    def __iter__(self) -> Iterator[ServedModel]:
        """In the order of the settings."""
        return iter(self._models)

    def open_to(self, tenant: Tenant) -> list[ServedModel]:
        return [model for model in self._models if not tenant.models or model.name in tenant.models]

    def find(self, name: str | None, tenant: Tenant) -> ServedModel:
        """By name or alias; None or nothing: the only one that the tenant may use.

        Raises ModelNotFound, which names but a few of those that the tenant may use; it hears of no other.
        """
        models = self.open_to(tenant)
        if not name and len(models) == 1:
            return models[0]
        if not name:
            raise ModelNotFound(
                f"The request must name one of the models that are served here: {_names(models)}.", "model"
            )
        model = self._by_name.get(name)
        if model is None or model not in models:
            shown = name[:NAME_CHARACTERS_MAX]
            raise ModelNotFound(f"The model {shown!r} is not served here. Served are: {_names(models)}.", "model")
        return model

    async def close(self) -> None:
        """Idempotent."""
        await asyncio.gather(*(model.upstream.close() for model in self._models if model.upstream is not None))


def _names(models: Sequence[ServedModel]) -> str:
    shown = ", ".join(repr(model.name) for model in models[:NAMES_TOLD_MAX])
    hidden = len(models) - NAMES_TOLD_MAX
    return f"{shown} and {hidden} more" if hidden > 0 else shown or "none"


def load_catalog(
    settings: RouterSettings,
    directories: Mapping[str, Path],
    threads: TextThreads,
    make_generator: Callable[[str, Tokenizer, ModelMetrics], Generator],
    metrics_of: Callable[[str], ModelMetrics],
) -> Catalog:
    """`directories` says where the tokenizer and chat template of each setting's `model` lie; models with the same
    one share what is loaded from it. Raises SettingsError if one cannot be loaded, or an upstream's key not read."""
    tokenizers = {
        model: Tokenizer.load(directories[model], trust_remote_code=settings.trust_remote_code)
        for model in dict.fromkeys(served.model for served in settings.served_models)
    }

    def serve(model: ModelSettings) -> ServedModel:
        tokenizer, metrics = tokenizers[model.model], metrics_of(model.name)
        return ServedModel(
            model.name,
            model.aliases,
            tokenizer,
            PromptEncoder(tokenizer, threads, settings.prompt_bytes_max),
            make_generator(model.name, tokenizer, metrics),
            model.context_length_max,
            None if model.upstream is None else Upstream(model.upstream, model.name, metrics),
        )

    return Catalog(map(serve, settings.served_models))
