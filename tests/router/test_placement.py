import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.cluster.worker_info import Load, Role, WorkerInfo
from baton.errors import Unavailable
from baton.ids import RequestId, WorkerId
from router.placement import InFlight, Placer, PrefixBelief

PROMPT = tuple(range(100))


def worker(name: str, role: Role = "decode", *, epoch: str = "1", blocks: int = 1000, **load: int) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        role=role,
        state="ready",
        address=f"{name}:1",
        model="m",
        fingerprint="f",
        context_length=4096,
        vocabulary_size=1000,
        block_tokens=10,
        kv_dtype="float32",
        kv_blocks_total=blocks,
        epoch=epoch,
        load=Load(**load),
    )


def test_the_least_loaded_pair_is_chosen() -> None:
    workers = [
        worker("d1", kv_blocks_used=50),
        worker("d2", kv_blocks_used=5),
        worker("p1", "prefill", waiting_tokens=500),
        worker("p2", "prefill", waiting_tokens=10),
    ]
    placement = Placer().place(PROMPT, "", workers)
    assert placement.decode.worker.worker_id == "d2"
    assert [candidate.worker.worker_id for candidate in placement.prefill] == ["p2", "p1"]
    assert [candidate.worker.worker_id for candidate in placement.rejected] == ["d1"]


def test_no_decode_worker_is_an_error_and_no_prefill_worker_is_not() -> None:
    with pytest.raises(Unavailable):
        Placer().place(PROMPT, "", [worker("p1", "prefill")])
    assert Placer().place(PROMPT, "", [worker("d1")]).prefill == ()


def test_a_prefill_worker_of_other_weights_is_none() -> None:
    other = worker("p1", "prefill").model_copy(update={"fingerprint": "g"})
    assert Placer().place(PROMPT, "", [worker("d1"), other]).prefill == ()


def test_what_was_placed_counts_until_it_ends() -> None:
    placer, workers = Placer(), [worker("d1"), worker("d2"), worker("p1", "prefill"), worker("p2", "prefill")]
    other_prompts = [tuple(range(1000 * i, 1000 * i + 100)) for i in range(1, 5)]
    chosen = []
    for number, prompt in enumerate(other_prompts):
        placement = placer.place(prompt, "", workers)
        placer.started(RequestId(str(number)), placement)
        chosen.append((placement.decode.worker.worker_id, placement.prefill[0].worker.worker_id))
    assert sorted(chosen) == [("d1", "p1"), ("d1", "p1"), ("d2", "p2"), ("d2", "p2")]
    for number in range(4):
        placer.in_flight.finished(RequestId(str(number)))
    assert not placer.in_flight._waiting_tokens and not placer.in_flight._held_tokens


def test_a_first_token_ends_the_waiting_but_not_the_holding() -> None:
    in_flight, one, two = InFlight(), worker("d1"), worker("p1", "prefill")
    placement = Placer().place(PROMPT, "", [one, two])
    in_flight.started(RequestId("r"), placement)
    assert (in_flight.waiting_tokens(two), in_flight.held_tokens(one)) == (100, 100)
    in_flight.prefilled(RequestId("r"))
    in_flight.prefilled(RequestId("r"))
    assert (in_flight.waiting_tokens(two), in_flight.held_tokens(one)) == (0, 100)


def test_a_prompt_goes_where_its_prefix_is_believed_to_be_until_load_outweighs_it() -> None:
    placer, idle = Placer(), [worker("d1"), worker("d2")]
    first = placer.place(PROMPT, "", idle)
    placer.started(RequestId("a"), first)
    placer.in_flight.finished(RequestId("a"))
    again = placer.place((*PROMPT, 1, 2, 3), "", idle)
    assert again.decode.worker.worker_id == first.decode.worker.worker_id
    assert (again.decode.missing_tokens, again.rejected[0].missing_tokens) == (3, 103)
    busy = [worker("d1", kv_blocks_used=11), worker("d2")]
    assert placer.place((*PROMPT, 1, 2, 3), "", busy).decode.worker.worker_id == "d2"


def test_another_salt_shares_nothing_and_a_restarted_worker_remembers_nothing() -> None:
    placer = Placer()
    placer.started(RequestId("a"), placer.place(PROMPT, "", [worker("d1")]))
    assert placer.place(PROMPT, "", [worker("d1")]).decode.missing_tokens == 1
    assert placer.place(PROMPT, "salt", [worker("d1")]).decode.missing_tokens == 100
    assert placer.place(PROMPT, "", [worker("d1", epoch="2")]).decode.missing_tokens == 100


def test_a_worker_without_room_comes_last() -> None:
    workers = [worker("d1", blocks=9), worker("d2", kv_blocks_used=500)]
    assert Placer().place(PROMPT, "", workers).decode.worker.worker_id == "d2"


@settings(deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 2), max_size=60).map(tuple), max_size=20))
def test_belief_stays_within_its_bound(prompts: list[tuple[int, ...]]) -> None:
    placer = Placer(belief=PrefixBelief(blocks_max=5))
    for prompt in prompts:
        placement = placer.place(prompt, "", [worker("d1")])
        placer.belief.learn(placement)
        assert len(placer.belief._holders) <= 5
        cached = placer.belief.cached_blocks(placement.decode.worker, placement.blocks)
        assert cached == min(len(placement.blocks), 5)
