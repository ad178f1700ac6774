"""Which models the paged engine serves right, and why it refuses the others.

The configuration is asked first, without loading a weight. Then, with the model in memory, one forward of
two tokens shows what its layers really ask of attention: a family that transformers adds tomorrow is
judged by what it does, not by a list of names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from baton.errors import UnsupportedModel
from engine.attention.kernels import AttentionOptions
from engine.attention.paged import STEP_ARGUMENT, paged_attention

PROBE_ATTENTION = "baton_probe"
"""The attention implementation that `probe` needs the model to be loaded with."""
_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_HARMLESS_TENSORS = {"position_ids", "cache_position"}
_FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)
_FAR = 2**24
_AGES = (-1, 0, *sorted({age for power in range(21) for age in (2**power - 1, 2**power, 2**power + 1)} - {0}))
"""How many positions before a query a mask is looked at; -1 is ahead of it."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What all layers of a model have in common."""

    layers: int
    kv_heads: int
    head_dim: int


def check_config(config: Any) -> None:
    """Raises UnsupportedModel with the reason when the configuration alone tells."""
    text = config.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYER_TYPES)
    reasons = {
        "it is an encoder-decoder model": config.is_encoder_decoder,
        "it is an encoder, which does not generate": getattr(text, "is_causal", True) is False
        or bool(getattr(text, "use_bidirectional_attention", False)),
        f"it has layers of {', '.join(others)}, whose state is not a KV cache over all positions": bool(others),
        "its attention is cut into chunks": getattr(text, "attention_chunk_size", None) is not None,
        "its layers share one another's KV cache": bool(getattr(text, "num_kv_shared_layers", 0)),
    }
    _refuse_if(config.model_type, reasons)


def check_class(family: str, model_class: Any) -> None:
    """Raises UnsupportedModel with the reason when the model's class tells."""
    reasons = {
        "it is recurrent or a hybrid with recurrent layers": bool(getattr(model_class, "_is_stateful", False)),
        "its transformers code does not let its attention be replaced": not model_class._supports_attention_backend,
    }
    _refuse_if(family, reasons)


def register_probe_attention() -> None:
    """Makes PROBE_ATTENTION a name that transformers knows; idempotent."""
    AttentionInterface.register(PROBE_ATTENTION, paged_attention)
    AttentionMaskInterface.register(PROBE_ATTENTION, _sampled_mask)


@torch.inference_mode()
def probe(model: Any) -> tuple[AttentionShape, int]:
    """What the layers of a model loaded with PROBE_ATTENTION have in common, and how many logits a position has.

    Raises UnsupportedModel when any layer asks for what the pool cannot hold or the kernels cannot compute.
    """
    family, seen = model.config.model_type, _Probe(model.config.model_type)
    two = torch.tensor([[0, 1]], device=model.device)
    inputs = {"input_ids": two, "position_ids": two, "attention_mask": torch.ones_like(two), "use_cache": False}
    try:
        logits: Tensor = model(**inputs, **{STEP_ARGUMENT: seen}).logits
    except _FORWARD_ERRORS as error:
        raise UnsupportedModel(f"Models of the family {family} cannot be served: a forward fails ({error}).") from None
    return seen.shape(model.config.get_text_config(decoder=True).num_hidden_layers), logits.shape[-1]


def _sampled_mask(*, mask_function: Callable[..., Tensor], device: torch.device, **_: Any) -> Tensor:
    """transformers' mask function for the probe: not a mask of two tokens, but what a far query would see."""
    zero, query = torch.tensor(0, device=device), torch.tensor(_FAR, device=device)
    return mask_function(zero, zero, query, query - torch.tensor(_AGES, device=device)).view(1, 1, 1, -1)


def _causal(window: int | None) -> list[bool]:
    """What the kernels let a far query see, at each of _AGES."""
    return [age >= 0 and (window is None or age < window) for age in _AGES]


class _Probe:
    """Stands in for a step: answers with zeros and remembers what it was asked."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._layers: list[tuple[int, int, int]] = []

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        del options
        are_alike = key.shape == value.shape and key.shape[-1] == query.shape[-1]
        _refuse_if(self._family, {"its keys and values have different sizes": not are_alike})
        layer: int = module.layer_idx  # type: ignore[assignment]
        self._layers.append((layer, key.shape[1], key.shape[2]))
        return torch.zeros_like(query)

    def check(self, module: torch.nn.Module, window: int | None, mask: Tensor | None, extra: dict[str, Any]) -> None:
        foreign = sorted(
            name for name, value in extra.items() if isinstance(value, Tensor) and name not in _HARMLESS_TENSORS
        )
        _refuse_if(
            self._family,
            {
                "its attention also looks ahead": _is_bidirectional(module, extra),
                f"its attention takes {', '.join(foreign)}, which paged attention does not know": bool(foreign),
                "its mask hides more than what lies ahead or before its window": not _is_plain(mask, window),
                "its attention layers carry no index": not isinstance(getattr(module, "layer_idx", None), int),
            },
        )

    def shape(self, layers: int) -> AttentionShape:
        indices = sorted(layer for layer, _, _ in self._layers)
        shapes = {(kv_heads, head_dim) for _, kv_heads, head_dim in self._layers}
        _refuse_if(
            self._family,
            {
                f"of its {layers} layers not each calls attention once": indices != list(range(layers)),
                "its layers have different numbers of KV heads or head sizes": len(shapes) > 1,
            },
        )
        kv_heads, head_dim = shapes.pop()
        return AttentionShape(layers, kv_heads, head_dim)


def _is_bidirectional(module: torch.nn.Module, extra: dict[str, Any]) -> bool:
    return extra.get("is_causal", getattr(module, "is_causal", True)) is False


def _is_plain(mask: Tensor | None, window: int | None) -> bool:
    """Whether a layer's mask means what the kernels do; models that make none leave it to them."""
    return mask is None or (mask.numel() == len(_AGES) and mask.flatten().tolist() == _causal(window))


def _refuse_if(family: str, reasons: dict[str, bool]) -> None:
    """`reasons` maps what would be wrong to whether it is."""
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModel(f"Models of the family {family} cannot be served: {reason}.")
