from dataclasses import replace
from typing import Any, cast

import pytest

from baton.errors import ModelNotFound, SettingsError, Unavailable
from baton.settings import ModelSettings, RouterSettings, load_settings
from router.admission.tenants import OPEN
from router.catalog import NAMES_TOLD_MAX, Catalog, ServedModel
from router.model_facts import ModelFacts

ANYTHING = cast(Any, None)


class Facts:
    """All that the catalog asks of a generator."""

    def __init__(self, facts: ModelFacts | None) -> None:
        self._facts = facts

    def facts(self) -> ModelFacts:
        if self._facts is None:
            raise Unavailable("No decode worker is ready.")
        return self._facts


def served(name: str, *aliases: str, context_length_max: int = 0, facts: ModelFacts | None = None) -> ServedModel:
    return ServedModel(name, aliases, ANYTHING, ANYTHING, cast(Any, Facts(facts)), context_length_max, None)


def test_models_are_found_by_name_and_alias() -> None:
    first, second = served("a", "default", "a/latest"), served("b")
    catalog = Catalog([first, second])
    assert [catalog.find(name, OPEN) for name in ("a", "default", "a/latest", "b")] == [first, first, first, second]
    assert list(catalog) == [first, second]


def test_what_is_not_served_is_told_with_what_is() -> None:
    catalog = Catalog([served("a", "alias"), served("b")])
    for name in ("A", "nothing", "a "):
        with pytest.raises(ModelNotFound, match=r"not served here\. Served are: 'a', 'b'") as caught:
            catalog.find(name, OPEN)
        assert caught.value.param == "model"


def test_sentences_are_bounded() -> None:
    catalog = Catalog([served(f"m{number}") for number in range(NAMES_TOLD_MAX + 3)])
    with pytest.raises(ModelNotFound, match="'m9' and 3 more") as caught:
        catalog.find("x" * 100_000, OPEN)
    assert len(str(caught.value)) < 500


def test_without_a_name_it_is_the_only_one_or_none() -> None:
    only = served("a")
    assert Catalog([only]).find(None, OPEN) is only and Catalog([only]).find("", OPEN) is only
    with pytest.raises(ModelNotFound, match=r"must name one of the models .*: 'a', 'b'"):
        Catalog([only, served("b")]).find(None, OPEN)


def test_a_tenant_sees_its_own_models_alone() -> None:
    tenant = OPEN.model_copy(update={"models": ("b",)})
    secret, own = served("secret", "alias"), served("b")
    catalog = Catalog([secret, own])
    assert catalog.open_to(tenant) == [own]
    assert catalog.find(None, tenant) is own
    for name in ("secret", "alias"):
        with pytest.raises(ModelNotFound) as caught:
            catalog.find(name, tenant)
        assert str(caught.value) == f"The model '{name}' is not served here. Served are: 'b'."


def test_a_models_context_is_the_smaller_of_its_own_and_what_the_server_gives() -> None:
    facts = ModelFacts(1000, 400)
    assert served("a", facts=facts).facts() == facts
    assert served("a", facts=facts, context_length_max=2000).facts() == facts
    assert served("a", facts=facts, context_length_max=100).facts().context_length == 100
    assert served("a", facts=facts).is_ready and not served("a").is_ready


def test_names_and_aliases_must_differ() -> None:
    models = [{"name": "a", "model": "x", "aliases": ["b"]}, {"name": "b", "model": "y"}]
    with pytest.raises(SettingsError, match="the name 'b' is given twice"):
        load_settings(RouterSettings, {"models": models})
    with pytest.raises(SettingsError, match="the name 'a' is given twice"):
        load_settings(RouterSettings, {"models": [{"name": "a", "model": "x", "aliases": ["a"]}]})


def test_without_a_list_the_one_model_is_served() -> None:
    settings = RouterSettings(model="/models/x", served_model_name="x")
    assert settings.served_models == (ModelSettings(name="x", model="/models/x"),)


def test_the_limit_that_binds_is_named() -> None:
    facts = ModelFacts(1000, 400).limited(500, "the context of this API key")
    assert facts.limited(0, "nothing") == facts and facts.limited(600, "more") == facts
    assert replace(facts, context_length=10).limited(500, "more").context_length == 10
    assert facts.limit == "the context of this API key"
