"""Prefill and decode workers whose KV blocks hold unlike numbers of tokens give the same tokens as any others."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from baton.cluster.redis_server import EmbeddedRedis
from baton.sampling import SamplingParams
from tests.decode_worker.pair import Pair, running_pair
from tests.decode_worker.test_transfer_faults import flipping, of_decode, wrap_connections
from tests.engine.tiny_models import make_model, random_prompt, reference

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
TOKEN_BYTES = 2 * 4 * 2 * 16 * 4  # keys and values, layers, heads, head dim, float32
PROMPT = random_prompt(150)
Run = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("unlike-blocks"))


@pytest.fixture
def with_pair(model: Path, redis_server: EmbeddedRedis, key_prefix: str) -> Run:
    def run(test: Callable[[Pair], Awaitable[None]], there: int, here: int, **settings: Any) -> None:
        """`there` is of the prefill worker."""
        settings = {"transports": ("inproc",), "kv_blocks": 60, "block_tokens": here, **settings}
        prefill = {"block_tokens": there, **settings.pop("prefill", {})}

        async def main() -> None:
            async with running_pair(model, redis_server.url, key_prefix, prefill=prefill, **settings) as pair:
                await test(pair)
                await pair.until_idle()
                for worker in (pair.prefill, pair.decode):
                    await worker._host.engine.call(lambda engine: engine.check_integrity())

        asyncio.run(main())

    return run


@pytest.mark.parametrize(
    ("transport", "there", "here"),
    [
        *((transport, *sizes) for transport in ("inproc", "shm", "tcp") for sizes in ((16, 32), (32, 16))),
        ("tcp", 16, 24),
        ("shm", 24, 7),
        ("inproc", 5, 64),
        ("inproc", 64, 5),
    ],
)
def test_tokens_are_those_of_one_worker_alone(
    transport: str, there: int, here: int, model: Path, with_pair: Run
) -> None:
    prompts = [random_prompt(length, seed=length) for length in (96, 133, 150)]

    async def test(pair: Pair) -> None:
        answers = await asyncio.gather(*(pair.ask(prompt, GREEDY) for prompt in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == reference(model, prompt, 8)
            assert answer.timeline.transport == transport
            assert answer.timeline.transfer_bytes == -(-len(prompt) // here) * here * TOKEN_BYTES
        assert of_decode(pair, "baton_kv_blocks_verified_total", result="mismatch") == 0

    with_pair(
        test, there, here, transports=(transport,), kv_blocks=250 if here < 16 else 60, prefill={"kv_blocks": 250}
    )


@pytest.mark.parametrize("chunk_tokens", [5, 40, 512])
def test_chunks_of_any_size(chunk_tokens: int, model: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        answer = await pair.ask(PROMPT, GREEDY)
        assert answer.token_ids == reference(model, PROMPT, 8)
        assert answer.timeline.transport == "inproc"

    with_pair(test, 16, 24, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize(("there", "here"), [(16, 24), (24, 16)])
def test_what_either_has_cached_is_used(there: int, here: int, model: Path, with_pair: Run) -> None:
    longer = PROMPT[:100] + random_prompt(100, seed=5)

    async def test(pair: Pair) -> None:
        cold = await pair.ask(PROMPT, GREEDY)
        partly = await pair.ask(longer, GREEDY)
        assert cold.token_ids == reference(model, PROMPT, 8)
        assert partly.token_ids == reference(model, longer, 8)
        assert partly.timeline.cached_tokens == 100 // here * here
        assert partly.timeline.prefill_cached_tokens == 100 // there * there
        assert partly.timeline.transfer_bytes == (-(-200 // here) - 100 // here) * here * TOKEN_BYTES

    with_pair(test, there, here)


def test_without_digests(model: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        answer = await pair.ask(PROMPT, GREEDY)
        assert (answer.token_ids, answer.timeline.transport) == (reference(model, PROMPT, 8), "inproc")

    with_pair(test, 16, 24, verify="never")


def test_sent_after_prefill(model: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        answer = await pair.ask(PROMPT, GREEDY)
        assert (answer.token_ids, answer.timeline.transport) == (reference(model, PROMPT, 8), "inproc")

    with_pair(test, 16, 24, prefill={"send": "after_prefill"})


def test_a_flipped_bit_is_caught_and_the_block_sent_again(model: Path, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        wrap_connections(pair, flipping(pair, times=1))
        answer = await pair.ask(PROMPT, GREEDY)
        assert answer.token_ids == reference(model, PROMPT, 8)
        assert answer.timeline.prefill_worker
        assert of_decode(pair, "baton_kv_blocks_verified_total", result="mismatch") == 1
        assert of_decode(pair, "baton_kv_blocks_verified_total", result="match") == 7
        assert of_decode(pair, "baton_kv_blocks_resent_total") == 1

    with_pair(test, 16, 24)


def test_a_block_that_changed_in_the_prefill_workers_cache_is_not_used(model: Path, with_pair: Run) -> None:
    longer = PROMPT[:100] + random_prompt(100, seed=5)

    async def test(pair: Pair) -> None:
        await pair.ask(PROMPT, GREEDY)
        region = pair.prefill._host.engine.region
        for block in range(region.layout.pool_blocks):
            region.writable(1, 0, block, 1)[5] ^= 1
        answer = await pair.ask(longer, GREEDY)
        assert answer.cached_tokens == 64, "which the prefill worker has more of"
        assert answer.token_ids == reference(model, longer, 8)
        assert answer.timeline.prefill_worker == "", "it fails there, and is computed here"

    with_pair(test, 16, 64)


def test_what_another_generated_counts_as_prompt(model: Path, with_pair: Run) -> None:
    whole = reference(model, PROMPT, 8)

    async def test(pair: Pair) -> None:
        answer = await pair.ask(PROMPT, GREEDY, generated=whole[:3])
        assert (answer.token_ids, answer.timeline.transport) == (whole[3:], "inproc")

    with_pair(test, 16, 24)


@pytest.mark.parametrize("chunk_tokens", [16, 512])
def test_taken_back_in_the_middle(chunk_tokens: int, with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        for seed in range(6):
            request_id = await pair.stream.submit(random_prompt(400, seed=seed), GREEDY, [pair.prefill.address])
            await asyncio.sleep(0.005 * seed)
            await pair.stream.cancel(request_id)
        await pair.until_idle()

    with_pair(test, 16, 24, chunk_tokens=chunk_tokens)
