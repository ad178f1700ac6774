from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission.fair_queue import Ask, Waiting
from router.admission.request_class import CLASSES, RequestClass
from router.admission.turn_queue import FLOORS, RETRY_AFTER_S_MAX, Joined, Refused, TurnQueue

FAR_S = 1e9


def ask(
    request_class: RequestClass = "standard", tenant: str = "a", tokens: int = 100, deadline_s: float = FAR_S
) -> Ask:
    return Ask(tenant, 1.0, request_class, tokens, deadline_s)


def join(queue: TurnQueue, one: Ask, now_s: float = 0.0) -> Waiting:
    joined = queue.join(one, now_s, 0.0)
    assert isinstance(joined, Joined), joined
    return joined.waiting


def drain(queue: TurnQueue, now_s: float = 0.0) -> list[Waiting]:
    order = []
    while (one := queue.release(now_s)) is not None:
        queue.check_integrity()
        order.append(one)
    return order


def test_the_more_urgent_pass() -> None:
    queue = TurnQueue(10)
    for name in ("batch", "standard", "interactive", "standard", "interactive"):
        join(queue, ask(name))  # type: ignore[arg-type]
    names = [one.ask.request_class for one in drain(queue)]
    assert names == ["interactive", "interactive", "standard", "standard", "batch"]


def test_no_class_starves_however_long_the_more_urgent_keep_coming() -> None:
    queue, given_to = TurnQueue(1000), Counter[RequestClass]()
    for _ in range(50):
        for name in CLASSES:
            join(queue, ask(name))
    for _ in range(400):
        one = queue.release(0.0)
        assert one is not None
        given_to[one.ask.request_class] += one.ask.tokens
        join(queue, ask(one.ask.request_class))
    total = given_to.total()
    for name in ("standard", "batch"):
        others = total - given_to[name]  # type: ignore[index]
        assert abs(given_to[name] / others - FLOORS[name]) < 0.005  # type: ignore[index]


def test_who_would_miss_its_deadline_is_refused_at_once() -> None:
    queue = TurnQueue(1000)
    for _ in range(20):
        join(queue, ask(tokens=1000, deadline_s=12.0))
    for second in range(1, 11):
        queue.release(float(second))  # a thousand tokens a second
    refused = queue.join(ask(deadline_s=15.0), 10.0, 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason == "deadline"
    assert 9 < refused.wait_s < 11
    assert 4 < refused.retry_after_s < 6, "when it would be in time"
    assert isinstance(queue.join(ask(deadline_s=21.5), 10.0, 0.0), Joined)
    assert isinstance(queue.join(ask("interactive", deadline_s=15.0), 10.0, 0.0), Joined), "it passes the others"


def test_what_it_waits_for_after_its_turn_counts_too() -> None:
    refused = TurnQueue(10).join(ask(deadline_s=2.0), 0.0, 2.0)
    assert isinstance(refused, Refused)
    assert refused.reason == "deadline"
    assert isinstance(TurnQueue(10).join(ask(deadline_s=2.1), 0.0, 2.0), Joined)


def test_a_stall_makes_the_predicted_wait_longer() -> None:
    queue = TurnQueue(10)
    for _ in range(5):
        join(queue, ask(tokens=1000))
    queue.release(1.0)
    assert queue.wait_s(ask(), 31.0) > 10 * queue.wait_s(ask(), 1.0)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    queue = TurnQueue(3)
    for _ in range(3):
        join(queue, ask(tokens=5000))
    queue.release(5.0)
    join(queue, ask(tokens=5000))
    refused = queue.join(ask(), 5.0, 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason == "queue_full"
    assert 14 < refused.retry_after_s < 16, "15,000 tokens at 1,000 a second"
    queue.check_integrity()


def test_nobody_waits_in_a_queue_of_none() -> None:
    refused = TurnQueue(0).join(ask("interactive"), 0.0, 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason == "queue_full"


def test_retry_after_is_bounded() -> None:
    queue = TurnQueue(1)
    join(queue, ask(tokens=1))
    queue.release(1000.0)
    join(queue, ask(tokens=10**9), 1000.0)
    assert queue.retry_after_s(1000.0) == RETRY_AFTER_S_MAX


def test_in_a_full_queue_the_more_urgent_displaces_the_youngest_of_the_least_urgent() -> None:
    queue = TurnQueue(3)
    join(queue, ask("standard"))
    join(queue, ask("batch"))
    youngest = join(queue, ask("batch"))
    joined = queue.join(ask("interactive"), 0.0, 0.0)
    assert isinstance(joined, Joined)
    assert joined.displaced is youngest
    assert len(queue) == 3
    assert isinstance(queue.join(ask("batch"), 0.0, 0.0), Refused), "its own class has nobody to give way"


def test_in_a_full_queue_the_longest_line_gives_way_to_another_tenant() -> None:
    queue = TurnQueue(4)
    lines = [join(queue, ask(tenant="flood")) for _ in range(4)]
    for displaced in (lines[3], lines[2]):
        joined = queue.join(ask(tenant="b"), 0.0, 0.0)
        assert isinstance(joined, Joined)
        assert joined.displaced is displaced
    assert isinstance(queue.join(ask(tenant="b"), 0.0, 0.0), Refused), "two each"
    assert isinstance(queue.join(ask(tenant="flood"), 0.0, 0.0), Refused)


def test_the_deadline_may_pass_in_line() -> None:
    queue = TurnQueue(3)
    late, fine = join(queue, ask(deadline_s=5.0)), join(queue, ask())
    assert queue.expire(4.9) == []
    assert queue.expire(5.0) == [late]
    assert drain(queue) == [fine]


def test_what_was_for_nothing_is_given_back() -> None:
    queue = TurnQueue(9)
    first = ask(tenant="a", tokens=1000)
    queue.start(first)
    queue.start(ask(tenant="b", tokens=100))
    queue.settle(first, 0)
    assert queue.served_tokens("standard") == {"a": 0, "b": 100}
    join(queue, ask(tenant="b"))
    join(queue, ask(tenant="a"))
    assert [one.ask.tenant for one in drain(queue)] == ["a", "b"]


@pytest.mark.parametrize("name", CLASSES)
def test_predicted_waits_come_true_at_a_steady_rate(name: RequestClass) -> None:
    queue, now_s = TurnQueue(1000), 0.0
    for i in range(100):
        join(queue, ask(CLASSES[i % 3], "abc"[i % 2], 500))
    for _ in range(20):
        now_s += 0.5
        queue.release(now_s)
    last = ask(name, tokens=500)
    predicted_s = queue.wait_s(last, now_s)
    waiting = join(queue, last, now_s)
    actual_s = drain(queue, now_s).index(waiting) * 0.5
    assert abs(actual_s - predicted_s) <= 0.1 * actual_s + 1.0


Step = tuple[str, int, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from("jjjjrrlt"), st.integers(0, 2), st.integers(0, 3), st.integers(1, 3000)), max_size=120
)


@given(st.integers(0, 8), STEPS)
def test_the_bound_holds_and_everyone_leaves_exactly_once(waiting_max: int, steps: list[Step]) -> None:
    queue, now_s = TurnQueue(waiting_max), 0.0
    here: list[Waiting] = []
    gone: list[Waiting] = []
    for what, place, tenant, number in steps:
        now_s += 0.01 * (number % 7)
        match what:
            case "j":
                one = ask(CLASSES[place], f"t{tenant}", number, now_s + number / 100)
                is_late = now_s + queue.wait_s(one, now_s) >= one.deadline_s
                is_full = len(queue) == waiting_max
                joined = queue.join(one, now_s, 0.0)
                if isinstance(joined, Refused):
                    assert joined.reason == ("deadline" if is_late else "queue_full")
                    assert is_late or (is_full and not _who_would_give_way(one, here))
                    continue
                assert not is_late
                assert (joined.displaced is not None) == is_full
                if joined.displaced is not None:
                    assert joined.displaced in _who_would_give_way(one, here)
                    here.remove(joined.displaced)
                    gone.append(joined.displaced)
                here.append(joined.waiting)
            case "r":
                released = queue.release(now_s)
                assert (released is None) == (not here)
                if released is not None:
                    here.remove(released)
                    gone.append(released)
            case "l" if here:
                leaver = here.pop(number % len(here))
                assert queue.leave(leaver)
                assert not queue.leave(leaver)
                gone.append(leaver)
            case "t":
                expired = queue.expire(now_s)
                assert set(expired) == {one for one in here if one.ask.deadline_s <= now_s}
                here = [one for one in here if one not in expired]
                gone += expired
        queue.check_integrity()
        assert set(queue) == set(here)
    gone += drain(queue)
    assert len(gone) == len(set(gone)) == len({one.number for one in gone})


def _who_would_give_way(one: Ask, here: list[Waiting]) -> list[Waiting]:
    """Naively: of the least urgent class there, if less urgent than `one`, or else of a tenant with a longer line;
    each such tenant's youngest, of those with the longest line."""
    if not here:
        return []
    least = max(CLASSES.index(waiting.ask.request_class) for waiting in here)
    line = [waiting for waiting in here if CLASSES.index(waiting.ask.request_class) == least]
    lengths = Counter(waiting.ask.tenant for waiting in line)
    urgency, longest = CLASSES.index(one.request_class), max(lengths.values())
    if urgency > least or (urgency == least and lengths[one.tenant] + 1 >= longest):
        return []
    youngest = {waiting.ask.tenant: waiting for waiting in sorted(line, key=lambda waiting: waiting.number)}
    return [waiting for tenant, waiting in youngest.items() if lengths[tenant] == longest]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 2000)), min_size=20, max_size=60))
def test_a_class_waits_for_no_more_than_its_floor_allows(arrivals: list[tuple[int, int, int]]) -> None:
    """Tokens given to others between two turns of a class that waits: cost / floor, and one request of each class."""
    queue = TurnQueue(10_000)
    for place, tenant, tokens in arrivals:
        join(queue, ask(CLASSES[place], f"t{tenant}", tokens))
    largest = max(tokens for _, _, tokens in arrivals)
    passed: defaultdict[RequestClass, int] = defaultdict(int)
    while (one := queue.release(0.0)) is not None:
        for name in ("standard", "batch"):
            if name == one.ask.request_class:
                passed[name] = 0
            elif queue.length(name):  # type: ignore[arg-type]
                passed[name] += one.ask.tokens  # type: ignore[index]
                assert passed[name] <= largest / FLOORS[name] + 3 * largest  # type: ignore[index]
