from hypothesis import given
from hypothesis import strategies as st

from baton.clock import ManualClock
from baton.ids import WorkerId
from router.cooldown import FIRST_S, FORGET_S, LONGEST_S, Cooldowns

A, B, P = WorkerId("decode-a"), WorkerId("decode-b"), WorkerId("prefill-p")


def made() -> tuple[Cooldowns, ManualClock]:
    clock = ManualClock(100.0)
    return Cooldowns(clock), clock


def fail(cooldowns: Cooldowns, clock: ManualClock, worker: WorkerId = A) -> float:
    """The cool-down that a new failure brings."""
    cooldowns.failed(worker, clock())
    return cooldowns.remaining_s(worker)


def test_it_doubles_up_to_its_bound() -> None:
    cooldowns, clock = made()
    seen = []
    for _ in range(9):
        seen.append(fail(cooldowns, clock))
        clock.advance(seen[-1])
        assert cooldowns.remaining_s(A) == 0 and not cooldowns.cooling()
    assert seen == [FIRST_S, 2, 4, 8, 16, 32, LONGEST_S, LONGEST_S, LONGEST_S]


def test_being_overloaded_does_not_add_up() -> None:
    cooldowns, clock = made()
    for _ in range(5):
        cooldowns.failed(A, clock(), is_overloaded=True)
        assert cooldowns.remaining_s(A) == FIRST_S
        clock.advance(FIRST_S)


def test_all_that_one_death_breaks_is_one_failure() -> None:
    cooldowns, clock = made()
    placed_s = clock()
    clock.advance(5)
    for _ in range(20):
        cooldowns.failed(A, placed_s)
        clock.advance(0.01)
    assert 0 < cooldowns.remaining_s(A) < FIRST_S


def test_a_success_forgives_only_what_was_before_it() -> None:
    cooldowns, clock = made()
    placed_s = clock()
    clock.advance(1)
    fail(cooldowns, clock)
    cooldowns.succeeded(A, placed_s)  # begun before it failed, and by luck finished
    assert cooldowns.remaining_s(A)
    clock.advance(FIRST_S)
    cooldowns.succeeded(A, clock())
    assert fail(cooldowns, clock) == FIRST_S


def test_who_cools_down_is_left_alone_with_a_reason() -> None:
    cooldowns, clock = made()
    assert cooldowns.excluded([A, B], [P]) == {}
    fail(cooldowns, clock)
    fail(cooldowns, clock, P)
    assert cooldowns.excluded([A, B], [P]) == {
        A: "cooling down after a failure, 1.0 s left",
        P: "cooling down after a failure, 1.0 s left",
    }
    assert cooldowns.excluded([B], []) == {}, "whom nobody asked about"


def test_the_least_bad_decode_worker_is_spared() -> None:
    cooldowns, clock = made()
    fail(cooldowns, clock)
    clock.advance(0.5)
    fail(cooldowns, clock, B)
    fail(cooldowns, clock, P)
    assert set(cooldowns.excluded([A, B], [P])) == {B, P}
    assert set(cooldowns.excluded([A], [P])) == {P}


def test_old_failures_are_forgotten() -> None:
    cooldowns, clock = made()
    fail(cooldowns, clock)
    clock.advance(FIRST_S + FORGET_S + 1)
    fail(cooldowns, clock, B)
    assert fail(cooldowns, clock) == FIRST_S


@given(st.lists(st.tuples(st.sampled_from([A, B, P]), st.booleans(), st.floats(0, 100)), max_size=50))
def test_a_decode_worker_is_always_left(steps: list[tuple[WorkerId, bool, float]]) -> None:
    cooldowns, clock = made()
    for worker, is_failure, seconds in steps:
        (cooldowns.failed if is_failure else cooldowns.succeeded)(worker, clock())
        clock.advance(seconds)
        assert len({A, B} - cooldowns.excluded([A, B], [P]).keys()) >= 1
        assert all(0 < left <= LONGEST_S for left in cooldowns.cooling().values())
