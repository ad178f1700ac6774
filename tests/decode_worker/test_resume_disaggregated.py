"""A request that another decode worker began: prefilled apart or here, the tokens are those that nothing disturbed."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from baton.cluster.redis_server import EmbeddedRedis
from baton.rpc import worker_pb2
from baton.sampling import SamplingParams
from tests.decode_worker.pair import Pair, running_pair
from tests.engine.tiny_models import make_model, random_prompt

PROMPT = random_prompt(150, seed=9)
WAYS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    "seeded": SamplingParams(
        temperature=0.9,
        seed=77,
        max_tokens=24,
        ignore_eos=True,
        repetition_penalty=1.2,
        presence_penalty=0.8,
        frequency_penalty=0.4,
        logit_bias={7: 3.0},
        min_tokens=20,
        logprobs=2,
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("resume-apart"))


async def resumed(pair: Pair, sampling: SamplingParams, undisturbed: list[int], cut: int, *, apart: bool) -> list[int]:
    """Under a salt of its own, so that nothing is found cached."""
    fields: dict[str, Any] = {"generated": undisturbed[:cut], "cache_salt": f"{cut} {apart}"}
    ask = pair.ask if apart else pair.stream.ask
    answer = await ask(PROMPT, sampling, **fields)
    assert answer.error == ""
    assert bool(answer.timeline.prefill_worker) is apart
    assert answer.timeline.cached_tokens == answer.timeline.prefill_cached_tokens == 0
    if sampling.logprobs is not None:
        told = [position.tokens[0].token_id for message in answer.messages for position in message.logprobs]
        assert told == answer.token_ids
    return answer.token_ids


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_on_token_by_token(way: str, model: Path, redis_server: EmbeddedRedis, key_prefix: str) -> None:
    async def main() -> None:
        async with running_pair(model, redis_server.url, key_prefix, kv_blocks=512) as pair:
            undisturbed = (await pair.ask(PROMPT, WAYS[way])).token_ids
            for cut in (1, 2, 10, 23):
                for apart in (True, False):
                    rest = await resumed(pair, WAYS[way], undisturbed, cut, apart=apart)
                    assert undisturbed[:cut] + rest == undisturbed, f"cut at {cut}, apart: {apart}"

    asyncio.run(main())


def test_past_its_deadline_a_request_ends_and_lets_go_on_both_sides(
    model: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    endless = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)

    async def main() -> None:
        async with running_pair(model, redis_server.url, key_prefix, kv_blocks=512, chunk_tokens=1) as pair:
            answer = await pair.ask(PROMPT, endless, deadline_s=0.05)
            assert answer.messages[-1].error_kind == worker_pb2.ERROR_KIND_DEADLINE_EXCEEDED
            assert "0.05 s" in answer.error
            await pair.until_idle()

    asyncio.run(main())


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_deadline_passes_whatever_the_engine_is_doing(
    has_begun: bool, model: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    """The engine stands still, before the request is admitted or when its first token is out."""
    endless = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)

    async def main() -> None:
        async with running_pair(model, redis_server.url, key_prefix, kv_blocks=512) as pair:
            go_on = threading.Event()
            stand_still = pair.decode._host.engine.post
            if not has_begun:
                stand_still(lambda _: go_on.wait(60))
            request_id = await pair.stream.submit(PROMPT, endless, deadline_s=3.0 if has_begun else 0.05)
            if has_begun:
                assert (await pair.stream.next_output(request_id)).token_ids
                stand_still(lambda _: go_on.wait(60))
            answer = await pair.stream.answer(request_id)
            assert answer.messages[-1].error_kind == worker_pb2.ERROR_KIND_DEADLINE_EXCEEDED
            go_on.set()
            await pair.until_idle()

    asyncio.run(main())
