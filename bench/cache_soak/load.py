"""Asks who owns which locker, of many ledgers, some of them much more often than others."""

import asyncio
import json
import random
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from baton.clock import Clock, monotonic
from engine.recall.text import LOCKERS, Ledger, question

ANSWER_TIMEOUT_S = 120.0
FAVOUR = 2.5
"""Ledgers are drawn by a uniform number to this power: the first tenth is asked in four of ten requests."""
UNKNOWN_SHARE = 0.1
"""Of the questions: about lockers that the ledger does not name."""
GIVEN_UP_SHARE = 0.02
"""Of the requests: the client goes away in the middle."""
GIVEN_UP_AFTER_S = 0.05


@dataclass(slots=True)
class Tally:
    answered: int = 0
    wrong: int = 0
    given_up: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """By reason."""


async def ask_until(
    url: str,
    model: str,
    ledgers: Sequence[Ledger],
    until_s: float,
    concurrency: int,
    seed: int,
    tally: Tally,
    advance: Callable[[], None],
    clock: Clock = monotonic,
) -> None:
    """So many at a time, each a new question as soon as the last is answered."""

    async def one(number: int, threads: Executor) -> None:
        chance = random.Random(f"{seed}-{number}")
        while clock() < until_s:
            ledger = ledgers[int(len(ledgers) * chance.random() ** FAVOUR)]
            await _ask(url, model, ledger, chance, tally, threads)
            advance()

    with ThreadPoolExecutor(concurrency) as threads:
        await asyncio.gather(*(one(number, threads) for number in range(concurrency)))


async def _ask(url: str, model: str, ledger: Ledger, chance: random.Random, tally: Tally, threads: Executor) -> None:
    locker = chance.choice(LOCKERS if chance.random() < UNKNOWN_SHARE else list(ledger.owners))
    is_given_up = chance.random() < GIVEN_UP_SHARE
    messages = [{"role": "system", "content": ledger.text}, {"role": "user", "content": question(locker)}]
    body = json.dumps({"model": model, "messages": messages, "temperature": 0, "max_tokens": 8}).encode()
    timeout_s = GIVEN_UP_AFTER_S if is_given_up else ANSWER_TIMEOUT_S
    try:
        reply = await asyncio.get_running_loop().run_in_executor(threads, _post, url, body, timeout_s)
    except (OSError, HTTPException, ValueError) as error:
        if is_given_up:
            tally.given_up += 1
        else:
            tally.failures[str(error) or type(error).__name__] += 1
        return
    tally.answered += 1
    usage = reply["usage"]
    tally.prompt_tokens += usage["prompt_tokens"]
    tally.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
    answer = reply["choices"][0]["message"]["content"].strip().removesuffix(".")
    tally.wrong += answer != ledger.owner(locker)


def _post(url: str, body: bytes, timeout_s: float) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return dict(json.load(response))
