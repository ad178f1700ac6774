"""What is cleared stays away: not copied down again, and not published by what was on its way."""

import pytest
from fake_tiers import FakeTiers
from tiered_toy import PROMPT, A, below, fill, names, reference, tiered, tiers_of
from toy_engine import ToyEngine

from baton.ids import RequestId, TenantTag, tenant_tag
from baton.sampling import SamplingParams
from engine.interface import EngineRequest, Prefill, Retention

ACME = tenant_tag("acme")


def test_clearing_forgets_all_tiers_but_what_is_held() -> None:
    toy = tiered(blocks=24)
    below(toy)
    toy.add("a", PROMPT, max_tokens=8)
    toy.step()
    toy.step()
    blocks, _ = toy.engine.clear_cache(None)
    assert blocks >= 5
    assert toy.engine.hold(names(PROMPT)).blocks == () and not tiers_of(toy).rows
    toy.run()
    assert toy.outputs[A] == reference(PROMPT, 8)
    toy.assert_idle()


def test_clearing_one_tenant_leaves_the_others() -> None:
    toy = ToyEngine(blocks=24)
    for tenant, salt in (("acme", "x"), ("other", "")):
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        toy.engine.add(EngineRequest(A, PROMPT, params, Prefill.HERE, salt, retention=Retention(tenant)))
        toy.run()
        toy.ended.clear()
        toy.admitted.clear()
    assert toy.engine.clear_cache(tenant_tag("acme")) == (5, 5 * toy.model.layout.block_bytes)
    held = toy.engine.hold(names(PROMPT))
    assert len(held.blocks) == 5
    toy.engine.let_go(held)


def ask(toy: ToyEngine, name: str, tenant: str, salt: str = "") -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    toy.engine.add(EngineRequest(RequestId(name), PROMPT, params, Prefill.HERE, salt, retention=Retention(tenant)))


def below_of(tenant: str) -> tuple[ToyEngine, FakeTiers]:
    """The prompt's blocks lie below HBM and are a tenant's; restores end when the test says so."""
    toy = tiered(blocks=24)
    ask(toy, "first", tenant)
    toy.run()
    fill(toy)
    tiers = tiers_of(toy)
    tiers.at_once = False
    return toy, tiers


def test_what_was_cleared_is_not_copied_down_again() -> None:
    toy = tiered()
    toy.add("a", PROMPT)
    toy.run()
    toy.engine.clear_cache(None)
    fill(toy)
    assert not tiers_of(toy).rows.keys() & set(names(PROMPT))
    toy.assert_idle()


@pytest.mark.parametrize("tenant", [None, ACME])
def test_a_restore_under_way_publishes_nothing_after_a_clear(tenant: TenantTag | None) -> None:
    toy, tiers = below_of("acme")
    ask(toy, "a", "acme")
    toy.step()
    toy.engine.clear_cache(tenant)
    tiers.restores[-1].finish()
    toy.step()
    assert toy.engine.hold(names(PROMPT)).blocks == ()
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)
    toy.assert_idle()


def test_who_restores_anothers_blocks_publishes_them_no_more_when_these_are_cleared() -> None:
    toy, tiers = below_of("acme")
    ask(toy, "a", "other")
    toy.step()
    toy.engine.clear_cache(ACME)
    tiers.restores[-1].finish()
    toy.step()
    assert toy.engine.hold(names(PROMPT)).blocks == ()
    toy.run()
    assert toy.outputs[A] == reference(PROMPT)


def test_a_restore_goes_on_when_somebody_else_is_cleared() -> None:
    toy, tiers = below_of("acme")
    ask(toy, "a", "acme")
    toy.step()
    toy.engine.clear_cache(tenant_tag("other"))
    tiers.restores[-1].finish()
    toy.run()
    held = toy.engine.hold(names(PROMPT))
    assert len(held.blocks) == 5
    toy.engine.let_go(held)


def test_a_promotion_under_way_publishes_nothing_after_a_clear() -> None:
    toy, tiers = below_of("acme")
    done: list[bool] = []
    assert toy.engine.promote(names(PROMPT), lambda: done.append(True))
    toy.engine.clear_cache(ACME)
    tiers.restores[-1].finish()
    toy.run()
    assert done == [True] and toy.engine.hold(names(PROMPT)).blocks == ()
    toy.assert_idle()


def test_what_was_promoted_is_still_its_tenants() -> None:
    toy, tiers = below_of("acme")
    toy.engine.promote(names(PROMPT), lambda: None)
    tiers.restores[-1].finish()
    toy.run()
    assert toy.engine.clear_cache(tenant_tag("other")) == (0, 0)
    assert toy.engine.clear_cache(ACME)[0] >= 5
    assert toy.engine.hold(names(PROMPT)).blocks == ()


def test_a_fetch_under_way_publishes_nothing_after_a_clear() -> None:
    toy = tiered(blocks=24)
    reserved = toy.engine.reserve(PROMPT, "", 5)
    toy.engine.clear_cache(ACME)
    toy.engine.adopt(reserved, (1,) * 5, Retention("acme"))
    toy.run()
    assert toy.engine.hold(names(PROMPT)).blocks == ()
    assert toy.engine.stats().kv_blocks_free == 24
    toy.assert_idle()
