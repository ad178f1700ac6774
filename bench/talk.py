"""Conversations as a load: every turn's prompt is all that was said before, and something new."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from bench.load import FIRST_TOKEN_ID, Stream, ask
from bench.measure import Completed, Failed, Outcome, percentile
from bench.sse import Endpoint, SSEConnection

TURN_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Talk:
    """What the conversations are like; lengths in tokens."""

    conversations: int
    turns: int
    system_prompts: int
    """How many different ones; conversations take them in turn."""
    system_tokens: int
    user_tokens: int
    output_tokens: int
    concurrency: int
    think_s: float
    """Mean of the pause between an answer and the next question, exponentially distributed."""
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Pass:
    """What one run of all conversations showed."""

    policy: str
    turns: int
    failures: int
    hit_rate: float
    """Cached tokens of all prompt tokens, as the server reports them."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    later_ttft_mean_s: float
    """Of the turns after a conversation's first."""
    e2e_mean_s: float
    duration_s: float


class AnswerStream(Stream):
    """Keeps the answer's token ids: the next turn repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.token_ids: list[int] = []

    def _read(self, arrival_s: float, event: dict[str, Any]) -> None:
        super()._read(arrival_s, event)
        for choice in event.get("choices", ()):
            self.token_ids += choice.get("token_ids") or ()


async def converse(
    endpoint: Endpoint, model: str, talk: Talk, seed: int, advance: Callable[[], None]
) -> list[list[Outcome]]:
    """Each conversation's turns; one that fails is the conversation's last."""
    randomness = random.Random(seed)
    ids = range(FIRST_TOKEN_ID, talk.vocabulary)
    systems = [randomness.choices(ids, k=talk.system_tokens) for _ in range(talk.system_prompts)]
    places = asyncio.Semaphore(talk.concurrency)

    async def one(index: int) -> list[Outcome]:
        own = random.Random(f"{seed}/{index}")
        async with places:
            return await _conversation(endpoint, model, talk, systems[index % len(systems)], own, advance)

    return await asyncio.gather(*map(one, range(talk.conversations)))


async def _conversation(
    endpoint: Endpoint, model: str, talk: Talk, system: list[int], own: random.Random, advance: Callable[[], None]
) -> list[Outcome]:
    said, outcomes = list(system), list[Outcome]()
    connection = await SSEConnection.connect(endpoint)
    for _ in range(talk.turns):
        said += own.choices(range(FIRST_TOKEN_ID, talk.vocabulary), k=talk.user_tokens)
        stream = AnswerStream()
        body = {
            "model": model,
            "prompt": said,
            "max_tokens": talk.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with asyncio.timeout(TURN_TIMEOUT_S):
            outcome = await ask(connection, endpoint.post("/v1/completions", body), stream)
        outcomes.append(outcome)
        advance()
        if isinstance(outcome, Failed):
            break
        said += stream.token_ids
        await asyncio.sleep(own.expovariate(1 / talk.think_s) if talk.think_s else 0)
    connection.close()
    return outcomes


def summarize(policy: str, conversations: Sequence[Sequence[Outcome]]) -> Pass | None:
    """None if no turn was answered."""
    done = _completed(chain(*conversations))
    if not done:
        return None
    ttfts = [turn.ttft_s for turn in done]
    later = [turn.ttft_s for turn in _completed(chain(*(turns[1:] for turns in conversations)))]
    return Pass(
        policy=policy,
        turns=len(done),
        failures=sum(map(len, conversations)) - len(done),
        hit_rate=sum(turn.cached_tokens for turn in done) / sum(turn.input_tokens for turn in done),
        ttft_mean_s=fmean(ttfts),
        ttft_p50_s=percentile(ttfts, 50) or 0.0,
        ttft_p99_s=percentile(ttfts, 99) or 0.0,
        later_ttft_mean_s=fmean(later) if later else 0.0,
        e2e_mean_s=fmean(turn.end_to_end_s for turn in done),
        duration_s=max(turn.end_s for turn in done) - min(turn.start_s for turn in done),
    )


def _completed(outcomes: Iterable[Outcome]) -> list[Completed]:
    return [outcome for outcome in outcomes if isinstance(outcome, Completed)]
