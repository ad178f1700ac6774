"""The scheduler's decisions, seen in the rows that reach the toy model; then everything at once, at random."""

from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import ToyEngine, toy_entries, toy_reference

from baton.ids import RequestId
from baton.sampling import SamplingParams
from engine.interface import Prefill
from engine.scheduler import Limits


def limits(chunk_tokens: int = 8, sequences_max: int = 8, waiting_max: int = 64) -> Limits:
    return Limits(chunk_tokens, sequences_max, waiting_max)


def shapes(toy: ToyEngine) -> list[list[tuple[str, int, int]]]:
    """For each step so far, each row's request, start and end."""
    return [[(row.request_id, row.start, row.start + len(row.token_ids)) for row in step] for step in toy.runner.steps]


# ---- chunks


def test_chunks_end_at_block_boundaries_until_the_prompt_ends() -> None:
    toy = ToyEngine(limits=limits(chunk_tokens=7))
    toy.add("a", range(1, 19), max_tokens=2)
    toy.run()
    assert shapes(toy) == [
        [("a", 0, 4)],
        [("a", 4, 8)],
        [("a", 8, 12)],
        [("a", 12, 18)],
        [("a", 18, 19)],
    ]


def test_a_chunk_smaller_than_a_block_ends_where_it_must() -> None:
    toy = ToyEngine(limits=limits(chunk_tokens=3))
    toy.add("a", range(1, 9), max_tokens=1)
    toy.run()
    assert shapes(toy) == [[("a", 0, 3)], [("a", 3, 4)], [("a", 4, 7)], [("a", 7, 8)]]


def test_decode_rows_come_first_and_prompts_share_the_rest() -> None:
    toy = ToyEngine(blocks=32, limits=limits(chunk_tokens=10))
    toy.add("a", range(1, 5), max_tokens=8)
    toy.step()
    toy.step()
    toy.add("b", range(11, 17))
    toy.add("c", range(20, 40))
    toy.step()
    toy.step()
    assert shapes(toy)[1] == [("a", 4, 5), ("b", 0, 6), ("c", 0, 3)]


def test_prompts_get_on_while_decode_rows_fill_the_step() -> None:
    toy = ToyEngine(blocks=64, limits=limits(chunk_tokens=4))
    for name in "abcdef":
        toy.add(name, [ord(name) % 50], max_tokens=20)
    toy.step()
    toy.step()
    toy.add("long", range(1, 13), max_tokens=1)
    toy.step()
    toy.step()
    assert len(toy.runner.steps[1]) == 7
    assert shapes(toy)[1][-1] == ("long", 0, 4)


def test_no_more_sequences_than_the_limit_run_at_once() -> None:
    toy = ToyEngine(blocks=64, limits=limits(sequences_max=3))
    for number in range(7):
        toy.add(f"r{number}", [number + 1], max_tokens=5)
    toy.run()
    assert max(len(step) for step in toy.runner.steps) == 3
    assert len(toy.ended) == 7


def test_a_sequence_whose_last_token_fills_a_block_needs_no_block_for_it() -> None:
    toy = ToyEngine(blocks=2)
    toy.add("a", range(1, 6), max_tokens=3)
    toy.run()
    assert len(toy.outputs[RequestId("a")]) == 3


# ---- admission and preemption


def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    toy = ToyEngine(blocks=8)
    toy.add("a", range(1, 17), max_tokens=10)
    toy.add("big", range(1, 30), salt="x", max_tokens=1)
    toy.add("small", [1], salt="y", max_tokens=1)
    order = []
    while toy.engine.has_work:
        order += [admitted.request_id for admitted in toy.step().admitted]
    assert order == ["a", "big", "small"]


def test_some_blocks_stay_free_at_admission_unless_nothing_else_runs() -> None:
    toy = ToyEngine(blocks=4)
    toy.add("a", range(1, 8), max_tokens=2)
    toy.add("b", range(11, 19), max_tokens=1)
    toy.step()
    assert list(toy.admitted) == ["a"]
    toy.run()
    alone = ToyEngine(blocks=4)
    alone.add("a", range(1, 16), max_tokens=1)
    alone.step()
    assert list(alone.admitted) == ["a"]


def preempting_engine(limits: Limits = limits()) -> ToyEngine:  # noqa: B008 - frozen
    """Two sequences that fit at admission and outgrow the pool."""
    toy = ToyEngine(blocks=6, limits=limits)
    toy.add("old", range(1, 9), max_tokens=14)
    toy.add("new", range(11, 17), max_tokens=14)
    return toy


def test_the_youngest_is_preempted_and_continues_with_the_same_tokens() -> None:
    toy = preempting_engine()
    toy.run()
    params = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
    assert toy.outputs[RequestId("old")] == toy_reference(range(1, 9), params, 24)
    assert toy.outputs[RequestId("new")] == toy_reference(range(11, 17), params, 24)
    assert toy.ended[RequestId("old")].preemptions == 0
    assert toy.ended[RequestId("new")].preemptions >= 1
    assert toy.engine.stats().preemptions == toy.ended[RequestId("new")].preemptions
    toy.assert_idle()


def test_the_preempted_goes_before_those_who_came_later() -> None:
    toy = preempting_engine(limits(sequences_max=2))
    toy.add("later", [30], max_tokens=1)
    while "old" not in toy.ended:
        toy.step()
        assert "later" not in toy.admitted, "it would fit, but it is not its turn"
    assert toy.engine.stats().preemptions >= 1
    toy.run()
    assert len(toy.ended) == 3
    toy.assert_idle()


def test_one_request_alone_may_use_the_whole_pool() -> None:
    toy = ToyEngine(blocks=4)
    toy.add("a", range(1, 8), max_tokens=None)
    toy.run()
    assert len(toy.outputs[RequestId("a")]) == 16 - 7
    assert toy.ended[RequestId("a")].preemptions == 0


def test_blocks_that_wait_for_another_engine_are_not_taken_away() -> None:
    toy = ToyEngine(blocks=6)
    toy.add("grows", range(1, 9), max_tokens=14)
    toy.add("away", range(11, 22), Prefill.ELSEWHERE)
    toy.run()
    assert toy.engine.stats().preemptions >= 1
    assert RequestId("grows") not in toy.ended, "it must wait"
    assert not toy.engine.has_work, "and not spin meanwhile"
    toy.engine.prefill_here(RequestId("away"))
    toy.run()
    assert set(toy.ended) == {"grows", "away"}
    assert len(toy.outputs[RequestId("grows")]) == 14
    toy.assert_idle()


def test_blocks_that_are_being_sent_are_not_taken_away() -> None:
    """Neither while they are computed, which takes longer here than the other's growth, nor while they are held."""
    toy = ToyEngine(blocks=6, limits=limits(chunk_tokens=1))
    prompt = tuple(range(11, 22))
    toy.add("grows", range(1, 8), max_tokens=14)
    sent = toy.add("sent", prompt, Prefill.ONLY)
    toy.run()
    assert toy.engine.stats().preemptions == 1
    assert RequestId("grows") not in toy.ended
    assert toy.stored(sent, len(prompt)) == toy_entries(prompt)
    toy.engine.release(sent)
    toy.run()
    assert len(toy.outputs[RequestId("grows")]) == 14
    toy.assert_idle()


# ---- everything at once

requests = st.fixed_dictionaries(
    {
        "arrives": st.integers(0, 20),
        "prefix": st.integers(0, 2),
        "prefix_tokens": st.integers(0, 14),
        "tail_tokens": st.integers(1, 8),
        "max_tokens": st.integers(1, 12),
        "prefill": st.sampled_from(Prefill),
        "salt": st.sampled_from(["", "", "tenant"]),
        "ignore_eos": st.booleans(),
        "min_tokens": st.sampled_from([0, 0, 1, 3]),
        "delay": st.integers(0, 6),
        "outcome": st.sampled_from(["finish", "finish", "finish", "prefill_here", "abort"]),
    }
)


class Story:
    """One request of the random run: what the two workers would do with it."""

    def __init__(self, number: int, plan: dict[str, object]) -> None:
        self.id = RequestId(f"r{number}")
        self.plan = plan
        self.prefill: Prefill = plan["prefill"]  # type: ignore[assignment]
        prefix = [(plan["prefix"] * 7 + i) % 50 for i in range(plan["prefix_tokens"])]  # type: ignore[operator, call-overload]
        self.prompt = prefix + [(number * 3 + i) % 50 for i in range(plan["tail_tokens"])]  # type: ignore[call-overload]
        min_tokens = min(plan["min_tokens"], plan["max_tokens"])  # type: ignore[type-var]
        self.sampling = {"max_tokens": plan["max_tokens"], "ignore_eos": plan["ignore_eos"], "min_tokens": min_tokens}
        self.age = 0
        """Steps since it was admitted (or, under ONLY, since its token)."""
        self.is_done = self.is_committed = False

    def expected(self, context_length: int) -> list[int]:
        tokens = toy_reference(self.prompt, SamplingParams(**self.sampling), context_length)  # type: ignore[arg-type]
        return tokens[:1] if self.prefill is Prefill.ONLY else tokens


def act(toy: ToyEngine, story: Story) -> None:
    """What becomes of a request outside the engine, between two steps."""
    if story.id not in toy.admitted or story.is_done:
        return
    if story.prefill is Prefill.ONLY and story.id not in toy.ended:
        return
    story.age += 1
    if story.age <= story.plan["delay"]:  # type: ignore[operator]
        return
    if story.plan["outcome"] == "abort":
        story.is_done = True
        toy.engine.abort(story.id)
    elif story.prefill is Prefill.ONLY:
        story.is_done = True
        assert toy.stored(story.id, len(story.prompt)) == toy_entries(story.prompt)
        toy.engine.release(story.id)
    elif story.prefill is Prefill.ELSEWHERE and not story.is_committed:
        story.is_committed = True
        fill_from_elsewhere(toy, story)


def fill_from_elsewhere(toy: ToyEngine, story: Story) -> None:
    if story.plan["outcome"] == "prefill_here":
        toy.engine.prefill_here(story.id)
        return
    other = ToyEngine(blocks=toy.blocks, context_length=toy.model.context_length)
    other.add(story.id, story.prompt, Prefill.ONLY, **story.sampling)
    other.run()
    admitted = toy.admitted[story.id]
    first = admitted.cached_tokens // toy.block_tokens
    pairs = list(zip(admitted.blocks, other.admitted[story.id].blocks, strict=True))[first:]
    toy.region.copy_blocks(other.region, pairs)
    toy.engine.commit(story.id, other.outputs[story.id][0], ())


@settings(max_examples=250, deadline=None)
@given(
    plans=st.lists(requests, min_size=1, max_size=14),
    blocks=st.integers(7, 16),
    chunk_tokens=st.sampled_from([1, 3, 4, 9, 64]),
    sequences_max=st.sampled_from([1, 3, 8]),
    prefix_cache=st.booleans(),
)
def test_any_traffic_gets_the_tokens_of_the_reference(
    plans: list[dict[str, object]], blocks: int, chunk_tokens: int, sequences_max: int, prefix_cache: bool
) -> None:
    toy = ToyEngine(blocks=blocks, limits=Limits(chunk_tokens, sequences_max, 64, prefix_cache))
    stories = [Story(number, plan) for number, plan in enumerate(plans)]
    arrivals = {story.id: story.plan["arrives"] for story in stories}
    for now in range(600):
        for story in stories:
            if arrivals[story.id] == now:
                toy.add(story.id, story.prompt, story.prefill, str(story.plan["salt"]), **story.sampling)
            act(toy, story)
        toy.step()
    for story in stories:
        output, expected = toy.outputs.get(story.id, []), story.expected(toy.model.context_length)
        if story.plan["outcome"] == "abort":
            assert output == expected[: len(output)]
        else:
            assert output == expected
    toy.assert_idle()
