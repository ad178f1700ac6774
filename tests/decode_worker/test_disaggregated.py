"""Prefill and decode apart give the tokens of transformers' own generate, on every path there is."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from baton.cluster.redis_server import EmbeddedRedis
from baton.rpc import common_pb2
from baton.sampling import SamplingParams
from tests.decode_worker.pair import AT_ONCE_S, TIMEOUT_S, Pair, RouterStream, running_pair
from tests.engine.tiny_models import FAMILIES, make_model, random_prompt, reference

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=1234, max_tokens=24, ignore_eos=True)
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
NOBODY = "127.0.0.1:1"

Run = Callable[..., None]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = make_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return model


@pytest.fixture
def llama(models: Callable[[str], Path]) -> Path:
    return models("llama")


@pytest.fixture
def with_pair(llama: Path, redis_server: EmbeddedRedis, key_prefix: str) -> Run:
    def run(test: Callable[[Pair], Awaitable[None]], model: Path = llama, **settings: Any) -> None:
        async def main() -> None:
            async with running_pair(model, redis_server.url, key_prefix, **settings) as pair:
                await test(pair)

        asyncio.run(main())

    return run


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_over_every_transport(
    family: str, transport: str, models: Callable[[str], Path], with_pair: Run
) -> None:
    prompts = [random_prompt(length, seed=length) for length in (70, 133)]

    async def test(pair: Pair) -> None:
        answers = await asyncio.gather(*(pair.ask(prompt, GREEDY) for prompt in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == reference(models(family), prompt, 24)
            assert answer.finish_reason == LENGTH
            assert answer.timeline.transport == transport
            layout_bytes = 2 * 4 * 8 * 2 * 16 * 4  # k and v, layers, tokens, heads, head dim, float32
            assert answer.timeline.transfer_bytes == layout_bytes * -(-len(prompt) // 8)
        third = random_prompt(90, seed=90)
        apart, alone = await pair.ask(third, SEEDED), await pair.stream.ask(third, SEEDED)
        assert (apart.timeline.transport, alone.timeline.transport) == (transport, "")
        assert apart.token_ids == alone.token_ids

    with_pair(test, models(family), transports=(transport,))


@pytest.mark.parametrize("chunk_tokens", [5, 64, 512])
def test_chunks_of_any_size(chunk_tokens: int, llama: Path, with_pair: Run) -> None:
    prompt = random_prompt(150)

    async def test(pair: Pair) -> None:
        assert (await pair.ask(prompt, GREEDY)).token_ids == reference(llama, prompt, 24)

    with_pair(test, chunk_tokens=chunk_tokens)


def test_only_what_the_decode_worker_lacks_travels(llama: Path, with_pair: Run) -> None:
    prompt = random_prompt(160)
    longer = prompt[:96] + random_prompt(80, seed=5)

    async def test(pair: Pair) -> None:
        cold = await pair.ask(prompt, GREEDY)
        partly = await pair.ask(longer, GREEDY)
        warm = await pair.ask(longer, GREEDY)
        assert cold.token_ids == reference(llama, prompt, 24)
        assert partly.token_ids == warm.token_ids == reference(llama, longer, 24)
        assert cold.timeline.cached_tokens == 0
        assert partly.timeline.cached_tokens == 96
        assert partly.timeline.transfer_bytes == cold.timeline.transfer_bytes // 20 * 10
        assert warm.timeline.cached_tokens == 168, "all whole blocks that leave a token to compute"
        assert warm.timeline.prefill_worker == "", "so little is left that the decode worker computes it"
        assert warm.cached_tokens == 168

    with_pair(test)


def test_what_the_prefill_worker_has_cached_is_sent_without_computing(llama: Path, with_pair: Run) -> None:
    prompt = random_prompt(160)

    async def test(pair: Pair) -> None:
        await pair.ask(prompt, GREEDY)
        await evict_everything(pair)
        again = await pair.ask(prompt, GREEDY)
        assert again.token_ids == reference(llama, prompt, 24)
        assert (again.timeline.cached_tokens, again.timeline.prefill_cached_tokens) == (0, 152)
        assert again.cached_tokens == 152
        assert again.timeline.transfer_bytes > 0

    async def evict_everything(pair: Pair) -> None:
        """From the decode worker: prompts that it prefills itself fill its pool."""
        for seed in (100, 101):
            await pair.stream.ask(random_prompt(330, seed=seed), SamplingParams(temperature=0, max_tokens=1))

    with_pair(test, prefill={"kv_blocks": 200}, kv_blocks=50)


def test_short_prompts_and_prompts_without_candidates_stay_on_the_decode_worker(llama: Path, with_pair: Run) -> None:
    short, long = random_prompt(64), random_prompt(120)

    async def test(pair: Pair) -> None:
        for answer, prompt in (
            (await pair.ask(short, GREEDY), short),
            (await pair.stream.ask(long, GREEDY), long),
        ):
            assert answer.token_ids == reference(llama, prompt, 24)
            assert (answer.timeline.prefill_worker, answer.timeline.transfer_bytes) == ("", 0)

    with_pair(test)


def test_sixteen_at_once_of_mixed_lengths_in_a_pool_that_does_not_hold_them(llama: Path, with_pair: Run) -> None:
    prompts = [random_prompt(5 + 13 * i, seed=i) for i in range(16)]

    async def test(pair: Pair) -> None:
        answers = await asyncio.gather(*(pair.ask(prompt, GREEDY) for prompt in prompts))
        assert [a.token_ids for a in answers] == [reference(llama, prompt, 24) for prompt in prompts]
        assert any(a.timeline.prefill_worker for a in answers)

    with_pair(test, kv_blocks=40)


def test_seeded_sampling_is_the_same_on_every_path(with_pair: Run) -> None:
    prompt = random_prompt(140)

    async def test(pair: Pair) -> None:
        apart = await pair.ask(prompt, SEEDED)
        cached = await pair.ask(prompt, SEEDED)
        alone = await pair.stream.ask(prompt, SEEDED)
        assert apart.timeline.prefill_worker
        assert apart.token_ids == cached.token_ids == alone.token_ids
        other_seed = await pair.stream.ask(prompt, SEEDED.with_changes(seed=99))
        assert other_seed.token_ids != alone.token_ids

    with_pair(test)


def test_logprobs_travel_with_the_first_token(with_pair: Run) -> None:
    prompt = random_prompt(140)

    async def test(pair: Pair) -> None:
        params = GREEDY.with_changes(logprobs=2)
        apart, alone = await pair.ask(prompt, params), await pair.stream.ask(prompt, params)

        def positions(answer: Any) -> list[list[int]]:
            found = [p for message in answer.messages for p in message.logprobs]
            return [[token.token_id for token in position.tokens] for position in found]

        assert len(positions(apart)) == 24
        assert positions(apart) == positions(alone)
        assert [position[0] for position in positions(apart)] == apart.token_ids

    with_pair(test)


def test_a_first_token_that_ends_the_sequence(llama: Path, with_pair: Run) -> None:
    prompt = random_prompt(140)
    first = reference(llama, prompt, 1)[0]

    async def test(pair: Pair) -> None:
        answer = await pair.ask(prompt, GREEDY.with_changes(stop_token_ids=(first,)))
        assert (answer.token_ids, answer.finish_reason) == ([first], STOP)
        one = await pair.ask(random_prompt(141, seed=3), GREEDY.with_changes(max_tokens=1))
        assert (len(one.token_ids), one.finish_reason) == (1, LENGTH)

    with_pair(test)


def test_a_dead_candidate_costs_nothing_but_time(llama: Path, with_pair: Run) -> None:
    prompt, other = random_prompt(140), random_prompt(150, seed=8)

    async def test(pair: Pair) -> None:
        second = await pair.stream.ask(prompt, GREEDY, [NOBODY, pair.prefill.address])
        assert second.token_ids == reference(llama, prompt, 24)
        assert second.timeline.prefill_worker == f"worker at {pair.prefill.address}"
        assert [list(message.failed_prefill_workers) for message in second.messages[:2]] == [
            [f"worker at {NOBODY}"],
            [],
        ]
        alone = await pair.stream.ask(other, GREEDY, [NOBODY])
        assert alone.token_ids == reference(llama, other, 24)
        assert alone.timeline.prefill_worker == ""

    with_pair(test)


def test_a_prefill_worker_with_other_weights_is_refused(llama: Path, with_pair: Run, tmp_path: Path) -> None:
    prompt = random_prompt(140)
    other = make_model("llama", tmp_path, seed=77)

    async def test(pair: Pair) -> None:
        answer = await pair.ask(prompt, GREEDY)
        assert answer.token_ids == reference(llama, prompt, 24)
        assert answer.timeline.prefill_worker == ""

    with_pair(test, prefill={"model": str(other)})


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_cancelling_at_any_moment_frees_the_blocks_of_both_workers(transport: str, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        for delay_ms in (0, 1, 3, 6, 10, 15, 25, 40, 80):
            prompt = random_prompt(400, seed=delay_ms)
            request_id = await pair.stream.submit(prompt, GREEDY.with_changes(max_tokens=100), [pair.prefill.address])
            await asyncio.sleep(delay_ms / 1000)
            await pair.stream.cancel(request_id)
            await pair.until_idle(AT_ONCE_S)

    with_pair(test, chunk_tokens=16, transports=(transport,))


def test_a_router_that_goes_away_cancels_what_it_asked(with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        router = RouterStream(pair.decode.address)
        for seed in range(4):
            await router.submit(
                random_prompt(300, seed=seed), GREEDY.with_changes(max_tokens=200), [pair.prefill.address]
            )
        stays = await pair.stream.submit(random_prompt(100, seed=50), GREEDY, [pair.prefill.address])
        await router.close()
        assert len((await pair.stream.answer(stays)).token_ids) == 24
        await pair.until_idle(AT_ONCE_S)

    with_pair(test)


def test_bad_requests_are_refused_with_a_sentence(with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        for prompt in ([], [5] * 600, [5, 100_000]):
            answer = await pair.ask(prompt, GREEDY)
            assert answer.finish_reason == common_pb2.FINISH_REASON_ERROR
            assert answer.error.endswith(".")
        request_id = await pair.stream.submit(random_prompt(100), GREEDY, request_id="twice")
        await pair.stream.submit(random_prompt(100), GREEDY, request_id="twice")
        outputs = [await pair.stream.next_output(request_id)]
        while outputs[-1].finish_reason != LENGTH:
            outputs.append(await pair.stream.next_output(request_id))
        assert any("in use" in output.error for output in outputs)

    with_pair(test)


def test_draining_finishes_what_runs_and_refuses_what_is_new(with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        running = await pair.stream.submit(random_prompt(150), GREEDY.with_changes(max_tokens=60))
        await pair.stream.next_output(running)
        draining = asyncio.ensure_future(pair.decode.drain())
        await asyncio.sleep(0)
        refused = await pair.stream.ask(random_prompt(20), GREEDY)
        assert "shutting down" in refused.error
        assert (await pair.stream.answer(running)).finish_reason == LENGTH
        await draining

    with_pair(test)


@pytest.mark.parametrize("first", ["prefill", "decode", "router"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_stopping_in_the_middle_of_everything_ends(
    first: str, transport: str, llama: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        async with running_pair(
            llama, redis_server.url, key_prefix, kv_blocks=40, chunk_tokens=16, transports=(transport,)
        ) as pair:
            prompts = [random_prompt(5 + 15 * seed, seed=seed) for seed in range(16)]
            ids = [await pair.stream.submit(prompt, GREEDY, [pair.prefill.address]) for prompt in prompts]
            await pair.stream.next_output(ids[0])
            stop = {"prefill": pair.prefill.stop, "decode": pair.decode.stop, "router": pair.stream.close}[first]
            await asyncio.wait_for(stop(), TIMEOUT_S)
            raise Left

    with pytest.raises(Left):
        asyncio.run(main())


@pytest.mark.parametrize("cancels", [False, True])
def test_a_call_that_ends_while_the_prefill_worker_lets_go_leaks_nothing(cancels: bool, with_pair: Run) -> None:
    """The decode worker hangs up as soon as it has its commit; letting go may take longer than that."""

    async def test(pair: Pair) -> None:
        book = pair.prefill._host.link_book
        connect = book.connect

        async def connect_slowly_closing(*arguments: Any) -> Any:
            connection = await connect(*arguments)
            close = connection.close

            async def close_slowly() -> None:
                await asyncio.sleep(0.2)
                await close()

            connection.close = close_slowly  # type: ignore[method-assign]
            return connection

        book.connect = connect_slowly_closing  # type: ignore[method-assign]
        request_id = await pair.stream.submit(random_prompt(400), GREEDY, [pair.prefill.address])
        if cancels:
            await asyncio.sleep(0.02)
            await pair.stream.cancel(request_id)
        else:
            assert (await pair.stream.answer(request_id)).timeline.prefill_worker
        await pair.until_idle()
        await asyncio.wait_for(pair.prefill.drain(), TIMEOUT_S)

    with_pair(test, chunk_tokens=16)


def test_a_tickets_own_deadline_counts_where_it_is_shorter(llama: Path, with_pair: Run) -> None:
    prompt = random_prompt(400)

    async def test(pair: Pair) -> None:
        pair.decode._remote_prefill._timeout_s = 1e-6
        answer = await pair.ask(prompt, GREEDY)
        assert answer.timeline.prefill_worker == "", "the prefill worker let go; the decode worker computed it"
        assert answer.token_ids == reference(llama, prompt, 24)

    with_pair(test, chunk_tokens=16, transports=("tcp",))


def test_where_the_time_went_is_told_with_the_first_token_and_in_the_end(with_pair: Run) -> None:
    prompt = random_prompt(140)

    async def test(pair: Pair) -> None:
        for answer in (await pair.ask(prompt, GREEDY), await pair.stream.ask(random_prompt(30), GREEDY)):
            first, *between, last = answer.messages
            assert not any(message.HasField("timeline") for message in between)
            for field in (
                "queue_s",
                "prefill_queue_s",
                "prefill_s",
                "transfer_exposed_s",
                "first_token_s",
                "transport",
            ):
                assert getattr(first.timeline, field) == getattr(last.timeline, field), field
            assert first.timeline.decode_s < last.timeline.decode_s
            waited_s = first.timeline.queue_s + first.timeline.prefill_queue_s + first.timeline.prefill_s
            assert 0 < waited_s + first.timeline.transfer_exposed_s <= first.timeline.first_token_s + 1e-6

    with_pair(test)


def test_a_worker_whose_engine_dies_of_a_bug_says_so(llama: Path, redis_server: EmbeddedRedis, key_prefix: str) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    async def main() -> None:
        async with running_pair(llama, redis_server.url, key_prefix) as pair:
            pair.decode._host.engine.post(lambda engine: setattr(engine, "step", broken))
            await pair.stream.submit(random_prompt(20), GREEDY)
            with pytest.raises(RuntimeError, match="a bug"):
                await pair.decode.failed()
            raise Left

    with pytest.raises(Left):
        asyncio.run(main())


class Left(Exception):
    """Raised to leave a running pair without waiting for what it does."""
