from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.served_tokens import ABSENT_MAX, SERVED_TOKENS, ServedElsewhere, ServedTokens, Share

A, B = Share("m", "standard", "a"), Share("m", "batch", "b")


def record(router_id: str, epoch: str = "1", **served: int) -> ServedTokens:
    names = {"a": A, "b": B}
    return ServedTokens(
        router_id=router_id, epoch=epoch, served=tuple((names[name], tokens) for name, tokens in served.items())
    )


def test_what_others_gave_since_the_last_time_is_told_once() -> None:
    elsewhere = ServedElsewhere("me")
    assert elsewhere.news([record("me", a=7), record("other", a=100)]) == {}, "before it was first seen"
    assert elsewhere.news([record("me", a=99), record("other", a=130, b=5)]) == {A: 30, B: 5}
    assert elsewhere.news([record("me", a=99), record("other", a=130, b=5)]) == {}
    assert elsewhere.news([record("other", a=120, b=5)]) == {A: -10}, "what was not used after all"


def test_a_router_that_starts_again_counts_from_nothing() -> None:
    elsewhere = ServedElsewhere("me")
    elsewhere.news([record("other", a=100)])
    assert elsewhere.news([record("other", epoch="2", a=20)]) == {}
    assert elsewhere.news([record("other", epoch="2", a=50)]) == {A: 30}


def test_what_was_given_while_nothing_was_heard_is_told_when_it_is_back() -> None:
    elsewhere = ServedElsewhere("me")
    elsewhere.news([record("other", a=100)])
    assert elsewhere.news([]) == {}
    assert elsewhere.news([record("other", a=400)]) == {A: 300}


def test_only_so_many_absent_routers_are_remembered() -> None:
    elsewhere = ServedElsewhere("me")
    elsewhere.news([record("first", a=1)])
    for i in range(ABSENT_MAX + 1):
        elsewhere.news([record(f"r{i}", a=1)])
    assert elsewhere.news([record("first", a=9)]) == {}
    assert elsewhere.news([record(f"r{ABSENT_MAX}", a=9)]) == {A: 8}


def test_a_record_survives_redis() -> None:
    written = record("other", a=3, b=4)
    assert SERVED_TOKENS.parse([written.model_dump_json(), "junk"]) == [written]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-50, 1000), st.booleans()), max_size=60))
def test_the_news_add_up_to_what_the_others_gave_since_they_were_first_seen(steps: list[tuple[int, int, bool]]) -> None:
    elsewhere, totals, told = ServedElsewhere("r0"), Counter({f"r{i}": 0 for i in range(4)}), 0
    elsewhere.news([record(name, a=0) for name in totals])
    for router, tokens, is_read in steps:
        totals[f"r{router}"] += tokens
        if is_read:
            news = elsewhere.news([record(name, a=total) for name, total in totals.items()])
            assert all(news.values())
            told += news.get(A, 0)
    told += elsewhere.news([record(name, a=total) for name, total in totals.items()]).get(A, 0)
    assert told == sum(total for name, total in totals.items() if name != "r0")
