"""What KV caches evict by elsewhere, and the most that any of them could reach: hits on a whole trace at once.

Each holds at most so many blocks after each request, finds a prompt's blocks only as far as all before them are there,
and lets no block go before those that follow on it. A request is a list of names, each different.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Container, Sequence
from math import inf

from baton.ids import BlockHash

Prompts = Sequence[Sequence[BlockHash]]


def lru_hits(prompts: Prompts, blocks_max: int) -> int:
    """The block that was not used longest goes; of a prompt, the tail before the head."""
    cached: OrderedDict[BlockHash, None] = OrderedDict()
    hits = 0
    for names in prompts:
        hits += _prefix(names, cached)
        for name in reversed(names):
            cached[name] = None
            cached.move_to_end(name)
        while len(cached) > blocks_max:
            cached.popitem(last=False)
    return hits


def lfu_hits(prompts: Prompts, blocks_max: int, remembers: bool) -> int:
    """The block that was used least often goes; of those, the one that was not used longest, the tail before the head.

    `remembers`: of every block ever seen, how often it was used (without a bound); else only while it is cached. A
    prompt's own blocks may go at once (on the trace that finds more than keeping them over others).
    """
    uses: Counter[BlockHash] = Counter()
    cached: dict[BlockHash, int] = {}
    """With when it was used last; no two at one time."""
    queue: list[tuple[int, int, BlockHash]] = []
    hits = now = 0
    for names in prompts:
        hits += _prefix(names, cached)
        for name in reversed(names):
            now += 1
            uses[name] += 1
            cached[name] = now
            heapq.heappush(queue, (uses[name], now, name))
        while len(cached) > blocks_max:
            _, at, name = heapq.heappop(queue)
            if cached.get(name) == at:
                del cached[name]
                if not remembers:
                    del uses[name]
    return hits


def belady_hits(prompts: Prompts, blocks_max: int) -> int:
    """The most that is possible for anyone, even who knows the future (Belady, 1966): the block whose next use is
    farthest goes, and one that is not used again is not taken in at all.

    It is the optimum for prefix caches, too: a block is never used later than one that follows on it, so with ties
    broken from the tail what is cached are whole prefixes, and no prefix cache finds more blocks than the best cache
    of blocks that need no predecessor.
    """
    next_uses = _next_uses(prompts)
    cached: dict[BlockHash, float] = {}
    queue: list[tuple[float, int, BlockHash]] = []
    hits = 0
    for names, nexts in zip(prompts, next_uses, strict=True):
        hits += _prefix(names, cached)
        for depth, (name, next_use) in enumerate(zip(names, nexts, strict=True)):
            cached[name] = next_use
            heapq.heappush(queue, (-next_use, -depth, name))
        while queue and (queue[0][0] == -inf or len(cached) > blocks_max):
            at, _, name = heapq.heappop(queue)
            if cached.get(name) == -at:
                del cached[name]
    return hits


def _next_uses(prompts: Prompts) -> list[list[float]]:
    """For each block of each prompt, the next prompt that has it; infinite if none has."""
    coming: dict[BlockHash, int] = {}
    nexts: list[list[float]] = []
    for number in reversed(range(len(prompts))):
        nexts.append([coming.get(name, inf) for name in prompts[number]])
        coming.update(dict.fromkeys(prompts[number], number))
    return nexts[::-1]


def _prefix(names: Sequence[BlockHash], cached: Container[BlockHash]) -> int:
    return next((depth for depth, name in enumerate(names) if name not in cached), len(names))
