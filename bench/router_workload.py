"""What a router is asked in the benchmark: conversations whose blocks lie on workers, and their next turns.

Plain Python that imports nothing of Baton: the peer's interpreter runs it too, and both get the same work.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

BLOCK_TOKENS = 32
CONVERSATION_BLOCKS = 128
SHARED_BLOCKS = 16
"""Every conversation starts with these, as with a system prompt, and every worker holds them."""
HOLDERS = 2
"""Workers that hold a conversation, all of it."""
EVENT_BLOCKS = 16
"""In one event at most: what an engine step of 512 prompt tokens stores."""

Form = Literal["tokens", "hashes"]
"""How a prompt is given: to be hashed by the router, or as the names of its blocks."""
FORMS: tuple[Form, ...] = ("tokens", "hashes")


@dataclass(frozen=True, slots=True)
class Conversation:
    tokens: list[int]
    """`Workload.conversation_blocks` whole blocks."""
    holders: tuple[int, ...]
    """Distinct workers; where there are two pools, one of each."""


@dataclass(frozen=True, slots=True)
class Step:
    """Blocks `[first, end)` of a conversation that an engine step of one worker stored or removed."""

    worker: int
    conversation: int
    first: int
    end: int
    is_removal: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """The same arguments give the same conversations and prompts, in any process."""

    workers: int
    indexed_blocks: int
    """Distinct blocks that lie somewhere; about, because conversations are whole."""
    prompt_blocks: int
    pools: int = 1
    """1: all workers decode and prefill. 2: the first half prefills, the second half decodes."""
    seed: int = 0

    @property
    def conversation_blocks(self) -> int:
        return max(CONVERSATION_BLOCKS, self.prompt_blocks)

    @property
    def shared_blocks(self) -> int:
        return min(SHARED_BLOCKS, self.prompt_blocks // 2)

    @property
    def own_blocks(self) -> int:
        """Of each conversation, after the shared ones."""
        return self.conversation_blocks - self.shared_blocks

    @property
    def conversations(self) -> int:
        return max(2, (self.indexed_blocks - self.shared_blocks) // self.own_blocks)

    @property
    def holdings(self) -> int:
        """Blocks that workers hold, a block on two workers counted twice."""
        return self.workers * self.shared_blocks + HOLDERS * self.conversations * self.own_blocks

    def conversation(self, index: int) -> Conversation:
        randomness = Random(f"{self.seed} conversation {index}")
        tokens = self.shared_tokens() + draw_tokens(randomness, self.own_blocks)
        return Conversation(tokens, self._holders(randomness))

    def shared_tokens(self) -> list[int]:
        return draw_tokens(Random(f"{self.seed} shared"), self.shared_blocks)

    def stored(self) -> Iterator[Step]:
        """How the workers came to hold what they hold; the shared blocks are each worker's first."""
        for worker in range(self.workers):
            yield from _steps(worker, 0, 0, self.shared_blocks)
        for index in range(self.conversations):
            for worker in self.conversation(index).holders:
                yield from _steps(worker, index, self.shared_blocks, self.conversation_blocks)

    def removed(self) -> Iterator[Step]:
        """Afterwards every other conversation goes, the first one among them, each from its end on."""
        for index in range(0, self.conversations, 2):
            for worker in self.conversation(index).holders:
                stored = list(_steps(worker, index, self.shared_blocks, self.conversation_blocks))
                yield from (replace(step, is_removal=True) for step in reversed(stored))

    def prompts(self, purpose: str) -> Iterator[list[int]]:
        """Endless next turns: some conversation's first blocks, between the shared ones and all, then new ones."""
        randomness = Random(f"{self.seed} {purpose}")
        while True:
            known = randomness.randint(self.shared_blocks, self.prompt_blocks)
            tokens = self.conversation(randomness.randrange(self.conversations)).tokens[: known * BLOCK_TOKENS]
            yield tokens + draw_tokens(randomness, self.prompt_blocks - known)

    def _holders(self, randomness: Random) -> tuple[int, ...]:
        if self.pools == 1:
            return tuple(randomness.sample(range(self.workers), HOLDERS))
        half = self.workers // 2
        return randomness.randrange(half), randomness.randrange(half, self.workers)


def _steps(worker: int, conversation: int, first: int, end: int) -> Iterator[Step]:
    for start in range(first, end, EVENT_BLOCKS):
        yield Step(worker, conversation, start, min(start + EVENT_BLOCKS, end))


def draw_tokens(randomness: Random, blocks: int) -> list[int]:
    return array("H", randomness.randbytes(2 * blocks * BLOCK_TOKENS)).tolist()
