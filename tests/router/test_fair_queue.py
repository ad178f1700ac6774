from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission.fair_queue import Ask, FairQueue, Waiting

FAR_S = 1e9
_numbers = count()


def waiting(tenant: str, tokens: int = 100, weight: float = 1.0, deadline_s: float = FAR_S) -> Waiting:
    return Waiting(Ask(tenant, weight, "standard", tokens, deadline_s), next(_numbers), 0.0)


def drain(queue: FairQueue) -> list[Waiting]:
    order = []
    while (head := queue.head()) is not None:
        queue.take(head)
        queue.check_integrity()
        order.append(head)
    return order


def tenants(order: list[Waiting]) -> str:
    return "".join(one.ask.tenant for one in order)


def test_two_tenants_alternate_however_many_each_has_in_line() -> None:
    queue = FairQueue()
    for tenant in "aaaaaab":
        queue.add(waiting(tenant))
    queue.add(waiting("b"))
    assert tenants(drain(queue)) == "ababaaaa"


def test_a_weight_of_two_gets_twice_the_tokens() -> None:
    queue = FairQueue()
    for _ in range(6):
        queue.add(waiting("a", weight=2.0))
        queue.add(waiting("b"))
    assert tenants(drain(queue))[:6].count("a") == 4


def test_shares_are_of_tokens_not_of_requests() -> None:
    queue = FairQueue()
    for _ in range(4):
        queue.add(waiting("a", tokens=300))
    for _ in range(12):
        queue.add(waiting("b", tokens=100))
    assert tenants(drain(queue)[:8]).count("b") == 6


def test_within_a_tenant_the_earliest_deadline_is_first_then_the_earliest_arrival() -> None:
    queue = FairQueue()
    lines = [waiting("a", deadline_s=9), waiting("a", deadline_s=5), waiting("a", deadline_s=9)]
    for one in lines:
        queue.add(one)
    assert drain(queue) == [lines[1], lines[0], lines[2]]


def test_who_was_idle_starts_level_with_the_others_and_not_ahead_of_them() -> None:
    queue = FairQueue()
    for _ in range(50):
        queue.start(Ask("a", 1.0, "standard", 100, FAR_S))
    for tenant in "aaabbb":
        queue.add(waiting(tenant))
    assert tenants(drain(queue)) in ("bababa", "babbaa", "bbabaa")


def test_what_was_not_used_is_given_back_and_what_was_used_beyond_is_owed() -> None:
    queue = FairQueue()
    ask = Ask("a", 1.0, "standard", 100, FAR_S)
    queue.start(ask)
    queue.start(Ask("b", 1.0, "standard", 100, FAR_S))
    queue.settle(ask, 400)
    assert queue.served_tokens == {"a": 400, "b": 100}
    for tenant in "aaaabbbb":
        queue.add(waiting(tenant))
    assert tenants(drain(queue)).startswith("bbb")


def test_what_other_routers_gave_a_tenant_counts() -> None:
    queue = FairQueue()
    for tenant in "aaaabbbb":
        queue.add(waiting(tenant))
    queue.served_elsewhere({"a": 300, "nobody": 5}, {"a": 1.0, "b": 1.0})
    assert tenants(drain(queue)).startswith("bbb")
    assert queue.served_tokens["a"] == 400, "served here alone: others tell their own"


def test_who_joins_starts_level_with_those_served_elsewhere() -> None:
    queue = FairQueue()
    queue.served_elsewhere({"a": 10_000}, {"a": 1.0})
    for tenant in "bbaa":
        queue.add(waiting(tenant))
    assert tenants(drain(queue)) == "baba"


def test_tokens_ahead_are_those_that_go_first() -> None:
    queue = FairQueue()
    for tenant in "aaaa":
        queue.add(waiting(tenant))
    queue.add(waiting("b"))
    assert queue.tokens_ahead(Ask("a", 1.0, "standard", 100, FAR_S)) == 500
    assert queue.tokens_ahead(Ask("a", 1.0, "standard", 100, 1.0)) == 0, "an earlier deadline"
    assert queue.tokens_ahead(Ask("b", 1.0, "standard", 100, FAR_S)) == 200, "one of each"


def test_the_longest_line_is_by_weight() -> None:
    queue = FairQueue()
    for _ in range(3):
        queue.add(waiting("a", weight=4.0))
    queue.add(waiting("b"))
    last = waiting("b")
    queue.add(last)
    assert queue.longest() == "b"
    assert queue.youngest("b") is last


def test_only_what_waits_can_be_taken_out() -> None:
    queue = FairQueue()
    one = waiting("a")
    assert not queue.remove(one)
    queue.add(one)
    assert not queue.remove(waiting("a"))
    assert queue.remove(one)
    assert not queue.remove(one)
    assert not queue


@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=4),
    sizes=st.lists(st.lists(st.integers(1, 5000), min_size=4, max_size=25), min_size=4, max_size=4),
    before=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5000)), max_size=10),
)
def test_while_two_tenants_wait_their_shares_differ_by_one_request_of_each_at_most(
    weights: list[float], sizes: list[list[int]], before: list[tuple[int, int]]
) -> None:
    """The bound of start-time fair queueing, over every interval, whatever went before."""
    queue = FairQueue()
    for tenant, tokens in before:
        weight = weights[tenant % len(weights)]
        queue.start(Ask(str(tenant % len(weights)), weight, "standard", tokens, FAR_S))
    lines = {str(i): [waiting(str(i), tokens, weight) for tokens in sizes[i]] for i, weight in enumerate(weights)}
    for line in lines.values():
        for one in line:
            queue.add(one)
    order = drain(queue)
    largest = {tenant: max(one.ask.tokens for one in line) for tenant, line in lines.items()}
    for tenant, tokens in before:
        name = str(tenant % len(weights))
        largest[name] = max(largest[name], tokens)
    for first in lines:
        for second in lines:
            if first < second:
                _check_pair(order, first, second, {str(i): weight for i, weight in enumerate(weights)}, largest)


def _check_pair(
    order: list[Waiting], first: str, second: str, weights: dict[str, float], largest: dict[str, int]
) -> None:
    last = {tenant: max(i for i, one in enumerate(order) if one.ask.tenant == tenant) for tenant in (first, second)}
    both_wait = order[: min(last.values()) + 1]
    bound = sum(largest[tenant] / weights[tenant] for tenant in (first, second))
    lead, leads = 0.0, [0.0]
    for one in both_wait:
        if one.ask.tenant in (first, second):
            given = one.ask.tokens / weights[one.ask.tenant]
            lead += given if one.ask.tenant == first else -given
            leads.append(lead)
    # The largest difference over any interval is that between two points of the lead.
    assert max(leads) - min(leads) <= bound * (1 + 1e-9)


@given(st.lists(st.tuples(st.sampled_from("aaddrtse"), st.integers(0, 3), st.integers(1, 1000)), max_size=60))
def test_everything_that_enters_leaves_exactly_once(steps: list[tuple[str, int, int]]) -> None:
    queue = FairQueue()
    here: list[Waiting] = []
    left: list[Waiting] = []
    for what, tenant, number in steps:
        match what:
            case "a" | "d":
                one = waiting(f"t{tenant}", number, 1.0 + tenant, float(number) if what == "d" else FAR_S)
                queue.add(one)
                here.append(one)
            case "r" if here:
                gone = here.pop(number % len(here))
                assert queue.remove(gone)
                left.append(gone)
            case "t" if (head := queue.head()) is not None:
                queue.take(head)
                here.remove(head)
                left.append(head)
            case "s":
                ask = Ask(f"t{tenant}", 1.0 + tenant, "standard", number, FAR_S)
                queue.start(ask)
                queue.settle(ask, number // 2)
            case "e":
                assert {one.number for one in queue.expired(number)} == {
                    one.number for one in here if one.ask.deadline_s <= number
                }
        queue.check_integrity()
        assert {one.number for one in queue} == {one.number for one in here}
        assert len(queue) == len(here)
    left += drain(queue)
    assert len(left) == len({one.number for one in left})


@pytest.mark.parametrize("number_of_tenants", [1, 7])
def test_tokens_ahead_is_what_is_given_before_it(number_of_tenants: int) -> None:
    queue = FairQueue()
    for i in range(60):
        tenant = i % number_of_tenants
        queue.add(waiting(f"t{tenant}", 50 + 13 * (i % 5), 1.0 + tenant))
    last = waiting("t0", 70, 1.0)
    predicted = queue.tokens_ahead(last.ask)
    queue.add(last)
    order = drain(queue)
    actual = sum(one.ask.tokens for one in order[: order.index(last)])
    assert abs(actual - predicted) <= 2 * 102 * number_of_tenants
