"""What an engine tells of its blocks' digests, and what it keeps."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyEngine

from baton.ids import BlockHash, BlockId, RequestId
from engine.digests import Digested
from engine.interface import BlocksDigested, Held, Prefill, StepResult
from engine.scheduler import Limits
from kvcache.block_hash import block_hashes, root_hash

A, B = RequestId("a"), RequestId("b")
PROMPT = tuple(range(1, 12))
"""Two whole blocks and a partial one, in chunks of eight."""


class Results(list[StepResult]):
    @property
    def digested(self) -> list[BlocksDigested]:
        return [event for result in self for event in result.digested]


def run(toy: ToyEngine) -> Results:
    results = Results()
    while toy.engine.has_work:
        results.append(toy.step())
        assert_known_digests_are_right(toy)
    return results


def assert_known_digests_are_right(toy: ToyEngine) -> None:
    """Against the blocks as they lie now: a digest of what was there before would show."""
    known = {block: digest for block, digest in toy.engine._digests.known().items() if digest is not None}
    assert list(known.values()) == toy.region.digests(list(known))


def names(tokens: Sequence[int]) -> list[BlockHash]:
    return block_hashes(root_hash("toy", 4, "float32"), tokens, 4)


class Slow:
    """A digester of a device: digests are there when `is_done` is set, or somebody waits."""

    def __init__(self) -> None:
        self.toy: ToyEngine | None = None
        self.is_done = False
        self.waits = 0

    def begin(self, blocks: Sequence[BlockId]) -> "SlowDigesting":
        assert self.toy is not None
        return SlowDigesting(self, Digested(self.toy.region.digests(blocks)))


class SlowDigesting:
    def __init__(self, owner: Slow, digested: Digested) -> None:
        self._owner, self._digested = owner, digested

    @property
    def is_done(self) -> bool:
        return self._owner.is_done

    def wait(self) -> tuple[int, ...]:
        self._owner.waits += not self.is_done
        return self._digested.wait()


def slow_engine(**options: object) -> tuple[ToyEngine, Slow]:
    slow = Slow()
    slow.toy = ToyEngine(digester=slow, **options)  # type: ignore[arg-type]
    return slow.toy, slow


# ---- fresh blocks


def test_every_block_is_told_once_in_order_and_not_after_the_first_token() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, Prefill.ONLY)
    results = run(toy)
    blocks = toy.admitted[A].blocks
    assert [(event.first, len(event.digests)) for event in results.digested] == [(0, 2), (2, 1)]
    assert [digest for event in results.digested for digest in event.digests] == toy.region.digests(blocks)
    assert results[-1].generated and results[-1].digested
    assert toy.admitted[A].digests == ()


def test_who_is_not_sent_is_not_digested() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, Prefill.HERE)
    toy.add("b", PROMPT[:6], Prefill.ELSEWHERE)
    toy.step()
    toy.engine.prefill_here(B)
    assert not run(toy).digested
    assert set(toy.engine._digests.known().values()) == {None}


def test_chunks_that_end_within_a_block_tell_it_when_it_is_whole() -> None:
    toy = ToyEngine(limits=Limits(chunk_tokens=3, sequences_max=8, waiting_max=64))
    toy.add("a", PROMPT, Prefill.ONLY)
    assert [event.first for event in run(toy).digested] == [0, 1, 2]


def test_a_device_is_not_waited_for_before_the_first_token() -> None:
    toy, slow = slow_engine(blocks=32, limits=Limits(chunk_tokens=4, sequences_max=8, waiting_max=64))
    toy.add("a", range(1, 17), Prefill.ONLY)
    toy.step()
    first, second = toy.step(), toy.step()
    assert not first.digested and not second.digested
    slow.is_done = True
    assert [event.first for event in toy.step().digested] == [0, 1, 2]
    slow.is_done = False
    assert slow.waits == 0
    last = toy.step()
    assert [event.first for event in last.digested] == [3] and last.generated


def test_an_aborted_request_is_not_heard_of_again() -> None:
    toy, slow = slow_engine(limits=Limits(chunk_tokens=4, sequences_max=8, waiting_max=64))
    toy.add("a", PROMPT, Prefill.ONLY)
    toy.step()
    toy.step()
    toy.engine.abort(A)
    toy.add("b", tuple(range(20, 29)), Prefill.ONLY)
    slow.is_done = True
    assert {event.request_id for event in run(toy).digested} == {B}
    assert_known_digests_are_right(toy)


def test_a_failed_step_tells_nothing() -> None:
    toy, slow = slow_engine()
    toy.add("a", PROMPT, Prefill.ONLY)
    toy.step()
    toy.step()
    toy.runner.fail_next = 1
    slow.is_done = True
    assert not run(toy).digested
    assert A in toy.failed


# ---- cached blocks


def test_what_is_cached_is_told_at_admission_and_not_again() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, Prefill.ONLY)
    before = run(toy).digested
    toy.engine.release(A)
    toy.add("b", (*PROMPT[:8], 40, 41), Prefill.ONLY)
    after = run(toy).digested
    assert toy.admitted[B].cached_tokens == 8
    assert toy.admitted[B].digests == before[0].digests
    assert [(event.first, len(event.digests)) for event in after] == [(2, 1)]


def test_what_was_decoded_here_is_digested_when_it_is_asked_for() -> None:
    toy = ToyEngine()
    toy.add("a", PROMPT, max_tokens=10)
    run(toy)
    tokens = [*PROMPT, *toy.outputs[A]]
    held = toy.engine.hold(names(tokens))
    assert len(held.blocks) == 5
    assert list(held.digests) == toy.region.digests(held.blocks)
    toy.engine.let_go(held)
    toy.add("b", tokens, Prefill.ONLY)
    run(toy)
    assert toy.admitted[B].digests == held.digests


def test_digests_that_came_along_are_kept() -> None:
    """Where a block came from elsewhere, what it should be is known, whatever lies there."""
    toy = ToyEngine()
    toy.add("a", PROMPT, Prefill.ELSEWHERE)
    toy.step()
    toy.engine.commit(A, 1, (), (11, 12, 13))
    toy.step()
    assert toy.engine.hold(names(PROMPT)).digests == (11, 12)


@pytest.mark.parametrize("prefill", [Prefill.ONLY, Prefill.HERE])
def test_without_a_digester_there_are_none(prefill: Prefill) -> None:
    toy = ToyEngine(makes_digests=False)
    toy.add("a", PROMPT, prefill)
    assert not run(toy).digested
    held = toy.engine.hold(names(PROMPT))
    assert len(held.blocks) == 2 and held.digests == ()
    toy.engine.let_go(held)
    toy.add("b", PROMPT, Prefill.ELSEWHERE)
    toy.step()
    toy.engine.commit(B, 1, (), (1,))
    run(toy)


def test_nothing_is_kept_without_a_prefix_cache() -> None:
    toy = ToyEngine(limits=Limits(8, 8, 64, prefix_cache=False))
    toy.add("a", PROMPT, Prefill.ONLY)
    assert len(run(toy).digested) == 2
    assert toy.engine._digests.known() == {}
    assert toy.engine.hold(names(PROMPT)) == Held((), ())


moves = st.lists(
    st.tuples(
        st.sampled_from(["only", "here", "elsewhere", "step", "release", "abort", "abandon", "hold", "let_go"]),
        st.integers(0, 5),
    ),
    max_size=50,
)


@settings(max_examples=60, deadline=None)
@given(moves=moves, blocks=st.integers(8, 14), is_slow=st.booleans())
def test_whatever_happens_what_is_known_is_right(moves: list[tuple[str, int]], blocks: int, is_slow: bool) -> None:
    """Blocks are taken away and used again all the time; a digest that is told is one of what lies there."""
    toy, slow = slow_engine(blocks=blocks)
    slow.is_done = not is_slow
    requests, helds = list[RequestId](), list[Held]()

    def step() -> None:
        for event in toy.step().digested:
            told = toy.admitted[event.request_id].blocks[event.first : event.first + len(event.digests)]
            assert list(event.digests) == toy.region.digests(told)

    for number, (move, which) in enumerate(moves):
        chosen = requests[which % len(requests)] if requests else None
        match move:
            case "only" | "here" | "elsewhere":
                prompt = [1 + which, *range(2, 9 + which)]
                requests.append(toy.add(f"r{number}", prompt, Prefill(move)))
            case "step":
                step()
            case "release" if chosen in toy.ended and toy.ended[chosen].request_id in toy.engine._sequences:
                toy.engine.release(chosen)
            case "abort" if chosen is not None:
                toy.engine.abort(chosen)
            case "abandon" if chosen is not None and chosen in {s.request_id for s in toy.engine._scheduler.reserved}:
                toy.engine.abandon(chosen)
            case "hold":
                helds.append(toy.engine.hold(names([1 + which, *range(2, 9 + which)])))
                assert list(helds[-1].digests) == toy.region.digests(helds[-1].blocks)
            case "let_go" if helds:
                toy.engine.let_go(helds.pop())
        toy.engine.check_integrity()
        assert_known_digests_are_right(toy)
    for held in helds:
        toy.engine.let_go(held)
    for request_id in requests:
        toy.engine.abort(request_id)
        toy.engine.reclaim(request_id)
    toy.assert_idle()
