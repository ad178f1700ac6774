"""Made-up traces, drawn by a seed: conversations that share system prompts, and prompts that share nothing."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from random import Random

from simulator.trace import TRACE_BLOCK_TOKENS, TraceRequest


@dataclass(frozen=True, slots=True)
class Conversations:
    """Conversations start as a Poisson process. Each opens with one of a few system prompts, popular ones more often
    (by Zipf's law), and has a geometric number of turns; each turn sends the history again, and an exponential pause
    follows each."""

    starts_per_s: float = 0.5
    system_prompts: int = 8
    system_tokens: int = 2048
    turns: float = 5.0
    """On average."""
    message_tokens: float = 800.0
    """What the user adds in a turn, on average; exponential."""
    output_tokens: float = 300.0
    """On average; exponential."""
    pause_s: float = 40.0

    def trace(self, requests: int, seed: int) -> list[TraceRequest]:
        """The first ones to arrive."""
        random, ids = Random(seed), count()
        blocks = self.system_tokens // TRACE_BLOCK_TOKENS
        systems = [tuple(islice(ids, blocks)) for _ in range(self.system_prompts)]
        popularity = [1 / rank for rank in range(1, self.system_prompts + 1)]
        next_turns: list[tuple[float, int, TraceRequest, Iterator[TraceRequest]]] = []
        start_s = random.expovariate(self.starts_per_s)
        made: list[TraceRequest] = []
        while len(made) < requests:
            if not next_turns or start_s < next_turns[0][0]:
                turns = self._turns(start_s, random.choices(systems, popularity)[0], random, ids)
                start_s += random.expovariate(self.starts_per_s)
            else:
                _, _, request, turns = heapq.heappop(next_turns)
                made.append(request)
            if (turn := next(turns, None)) is not None:
                heapq.heappush(next_turns, (turn.arrival_s, next(ids), turn, turns))
        return made

    def _turns(
        self, start_s: float, blocks: tuple[int, ...], random: Random, ids: Iterator[int]
    ) -> Iterator[TraceRequest]:
        time_s, tokens = start_s, len(blocks) * TRACE_BLOCK_TOKENS
        while True:
            tokens += 1 + round(random.expovariate(1 / self.message_tokens))
            output_tokens = 1 + round(random.expovariate(1 / self.output_tokens))
            whole = tokens // TRACE_BLOCK_TOKENS
            blocks = (*blocks, *islice(ids, whole - len(blocks)))
            tail = (next(ids),) if tokens % TRACE_BLOCK_TOKENS else ()
            yield TraceRequest(time_s, tokens, output_tokens, blocks + tail)
            if random.random() < 1 / self.turns:
                return
            tokens += output_tokens
            time_s += random.expovariate(1 / self.pause_s)


@dataclass(frozen=True, slots=True)
class Strangers:
    """A Poisson process of prompts that have nothing in common, their lengths exponential."""

    arrivals_per_s: float = 3.0
    prompt_tokens: float = 6000.0
    output_tokens: float = 300.0

    def trace(self, requests: int, seed: int) -> list[TraceRequest]:
        random, ids = Random(seed), count()
        time_s, made = 0.0, []
        for _ in range(requests):
            time_s += random.expovariate(self.arrivals_per_s)
            tokens = 1 + round(random.expovariate(1 / self.prompt_tokens))
            blocks = tuple(islice(ids, -(-tokens // TRACE_BLOCK_TOKENS)))
            made.append(TraceRequest(time_s, tokens, 1 + round(random.expovariate(1 / self.output_tokens)), blocks))
        return made
