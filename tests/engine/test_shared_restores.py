"""A prefix that somebody restores already is waited for, not restored twice."""

from tiered_toy import PROMPT, A, B, C, Now, below, names, reference, tiered

from engine.scheduler import OVERTAKEN_MAX

LONGER = (*PROMPT, 7, 8, 9)
OTHER = tuple(range(30, 40))


def test_who_wants_what_is_being_restored_finds_it_in_hbm() -> None:
    toy = tiered(blocks=24)
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    toy.add("b", LONGER)
    toy.step()
    toy.run()
    assert len(tiers.restores) == 1 and B not in toy.admitted
    tiers.restores[0].finish()
    toy.run()
    assert len(tiers.restores) == 1
    assert (toy.first[B].cached_tokens, toy.first[B].restored_tokens) == (20, 0)
    assert (toy.outputs[A], toy.outputs[B]) == (reference(PROMPT), reference(LONGER))
    toy.assert_idle()


def test_who_waits_for_the_restore_of_another_holds_up_nobody() -> None:
    toy = tiered(blocks=24)
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    toy.add("b", LONGER)
    toy.add("c", OTHER)
    toy.run()
    assert C in toy.ended and not toy.admitted.keys() & {B}
    tiers.restores[0].finish()
    toy.run()
    assert toy.first[B].cached_tokens == 20
    assert (toy.outputs[B], toy.outputs[C]) == (reference(LONGER), reference(OTHER))
    toy.assert_idle()


def test_as_many_are_overtaken_as_may_be() -> None:
    toy = tiered(blocks=48)
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    for number in range(OVERTAKEN_MAX + 1):
        toy.add(f"waits {number}", (*PROMPT, number + 1))
    toy.add("c", OTHER)
    toy.run()
    assert C not in toy.admitted
    tiers.restores[0].finish()
    toy.run()
    assert toy.outputs[C] == reference(OTHER)
    toy.assert_idle()


def test_who_wants_what_is_brought_up_for_a_peer_waits_for_it() -> None:
    toy = tiered(blocks=24)
    tiers = below(toy, at_once=False)
    assert toy.engine.promote(names(PROMPT), lambda: None)
    toy.add("a", PROMPT)
    toy.run()
    assert not toy.admitted.keys() & {A}
    tiers.restores[0].finish()
    toy.run()
    assert len(tiers.restores) == 1 and toy.first[A].cached_tokens == 20
    assert toy.outputs[A] == reference(PROMPT)


def test_when_the_restore_fails_the_others_see_for_themselves() -> None:
    toy = tiered(blocks=24)
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    toy.add("b", LONGER)
    toy.step()
    tiers.corrupt = {names(PROMPT)[2]}
    tiers.restores[0].finish()
    toy.run()
    assert (toy.outputs[A], toy.outputs[B]) == (reference(PROMPT), reference(LONGER))
    toy.assert_idle()


def test_when_the_first_is_aborted_the_others_restore_it() -> None:
    toy = tiered(blocks=24)
    tiers = below(toy, at_once=False)
    toy.add("a", PROMPT)
    toy.add("b", LONGER)
    toy.step()
    toy.engine.abort(A)
    tiers.at_once = True
    toy.run()
    assert len(tiers.restores) == 2 and toy.first[B].restored_tokens == 20
    assert toy.outputs[B] == reference(LONGER)
    toy.assert_idle()


def test_who_waits_does_not_wait_longer_than_a_restore_may_stall() -> None:
    toy = tiered(blocks=24)
    tiers = below(toy, at_once=False)
    tiers.stalls = True
    toy.add("a", PROMPT)
    toy.add("b", LONGER)
    toy.step()
    toy.run()
    assert isinstance(toy.clock, Now) and toy.engine.patience_s
    for _ in range(1000):
        toy.clock.pass_time(toy.engine.patience_s or 0.0)
        tiers.stalls, tiers.at_once = False, True
        toy.run()
        if B in toy.ended:
            break
    assert (toy.outputs[A], toy.outputs[B]) == (reference(PROMPT), reference(LONGER))
    toy.assert_idle()
