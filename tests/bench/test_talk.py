"""The conversation load against a server that answers as scripted."""

import asyncio
from typing import Any

from scripted_server import Answer, ScriptedServer, send_json, send_stream, token_events

from bench.measure import Failed, Outcome
from bench.sse import Endpoint
from bench.talk import Talk, converse, summarize

TALK = Talk(
    conversations=4,
    turns=3,
    system_prompts=2,
    system_tokens=5,
    user_tokens=2,
    output_tokens=3,
    concurrency=2,
    think_s=0,
    vocabulary=1000,
)


def run(answer: Answer) -> tuple[list[list[Outcome]], ScriptedServer]:
    async def main() -> tuple[list[list[Outcome]], ScriptedServer]:
        async with ScriptedServer(answer) as server:
            return await converse(Endpoint.parse(server.url), "m", TALK, 1, lambda: None), server

    return asyncio.run(main())


async def three_tokens(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await send_stream(writer, b"".join(token_events([1, 2], len(request["prompt"]))), 1 << 20)


def test_a_turn_repeats_all_that_was_said_before() -> None:
    conversations, server = run(three_tokens)
    prompts = [request["prompt"] for request in server.requests]
    assert [len(turns) for turns in conversations] == [3] * 4
    assert sorted(map(len, prompts)) == sorted([7, 12, 17] * 4)
    for longer in (prompt for prompt in prompts if len(prompt) > 7):
        assert any(longer[: len(shorter) + 3] == [*shorter, 7, 7, 7] for shorter in prompts), "history and answer"
    assert len({tuple(prompt[:5]) for prompt in prompts}) == 2, "system prompts are shared"
    assert server.in_progress_max == 2


def test_figures_tell_first_turns_from_later_ones() -> None:
    conversations, _ = run(three_tokens)
    figures = summarize("p", conversations)
    assert figures is not None
    assert (figures.policy, figures.turns, figures.failures, figures.hit_rate) == ("p", 12, 0, 0.0)
    assert 0 < figures.later_ttft_mean_s <= figures.ttft_p99_s


def test_a_conversation_ends_with_a_turn_that_fails() -> None:
    async def refuse_long(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if len(request["prompt"]) > 7:
            await send_json(writer, 503, b'{"error": {"message": "no"}}')
        else:
            await three_tokens(request, writer)

    conversations, _ = run(refuse_long)
    assert [isinstance(turns[-1], Failed) and len(turns) == 2 for turns in conversations] == [True] * 4
    figures = summarize("p", conversations)
    assert figures is not None and (figures.turns, figures.failures, figures.later_ttft_mean_s) == (4, 4, 0.0)
    assert summarize("p", [[Failed("no")]]) is None
