"""What is known of the digests of an engine's blocks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from baton.ids import BlockHash, BlockId, RequestId
from engine.digests import Digester, Digesting
from engine.interface import BlocksDigested

OnKnown = Callable[[Sequence[BlockHash], Sequence[int]], None]


@dataclass(frozen=True, slots=True)
class FreshBlocks:
    """The blocks of a request from its `first` on that a step made final."""

    request_id: RequestId
    first: int
    blocks: tuple[BlockId, ...]


@dataclass(slots=True)
class _Step:
    """The fresh blocks of one step, digested together."""

    fresh: Sequence[FreshBlocks]
    digesting: Digesting
    forgotten: set[RequestId] = field(default_factory=set)


class DigestBook:
    """Has fresh blocks digested for those who receive them, and keeps the digests of blocks in the prefix cache, whose
    content stays as it is; what it does not know it has computed when asked. A kvcache.block_pool.PoolListener.

    Without a digester it makes none, and tells none.
    """

    def __init__(self, digester: Digester | None, on_known: OnKnown | None = None) -> None:
        """`on_known` hears the digests of cached blocks as soon as they are known."""
        self._digester, self._on_known = digester, on_known
        self._steps: deque[_Step] = deque()
        self._cached: dict[BlockId, int | None] = {}
        """Of each block of the prefix cache, held or not; None: not computed yet."""
        self._names: dict[BlockId, BlockHash] = {}
        """Of the same blocks, for `on_known`."""

    # ---- what the pool tells

    def stored(self, block: BlockId, name: BlockHash) -> None:
        self._cached[block] = None
        if self._on_known is not None:
            self._names[block] = name

    def removed(self, block: BlockId, name: BlockHash) -> None:
        del name
        del self._cached[block]
        self._names.pop(block, None)

    def flush(self) -> None:
        """Nothing: a block's digest goes with its name."""

    # ---- fresh blocks

    def begin(self, fresh: Sequence[FreshBlocks]) -> None:
        """What a step has just written is final. Waits for no device."""
        if self._digester is not None and fresh:
            blocks = [block for part in fresh for block in part.blocks]
            self._steps.append(_Step(fresh, self._digester.begin(blocks)))

    def take(self, *, wait: bool) -> tuple[BlocksDigested, ...]:
        """What has been digested by now, in order, but of forgotten requests; with `wait` all that was begun."""
        told: list[BlocksDigested] = []
        while self._steps and (wait or self._steps[0].digesting.is_done):
            told += self._finish(self._steps.popleft())
        return tuple(told)

    def _finish(self, step: _Step) -> Iterator[BlocksDigested]:
        digests = iter(step.digesting.wait())
        for part in step.fresh:
            own = tuple(digest for _, digest in zip(part.blocks, digests, strict=False))
            if part.request_id not in step.forgotten:
                self.note(part.blocks, own)
                yield BlocksDigested(part.request_id, part.first, own)

    def forget(self, request_id: RequestId) -> None:
        """Its blocks may soon hold something else: what was begun of them is not told."""
        for step in self._steps:
            step.forgotten.add(request_id)

    # ---- cached blocks

    def note(self, blocks: Iterable[BlockId], digests: Iterable[int]) -> None:
        """Digests of blocks as they lie; those of cached blocks are kept."""
        if self._digester is not None:
            self._know({block: digest for block, digest in zip(blocks, digests, strict=True) if block in self._cached})

    def of(self, blocks: Sequence[BlockId]) -> tuple[int, ...]:
        """Of these blocks of the prefix cache; none at all without a digester. May wait for the device."""
        if self._digester is None:
            return ()
        if unknown := [block for block in blocks if self._cached[block] is None]:
            self._know(dict(zip(unknown, self._digester.begin(unknown).wait(), strict=True)))
        return tuple(digest for block in blocks if (digest := self._cached[block]) is not None)

    def _know(self, digests: Mapping[BlockId, int]) -> None:
        self._cached.update(digests)
        if self._on_known is not None and digests:
            self._on_known([self._names[block] for block in digests], list(digests.values()))

    def known(self) -> dict[BlockId, int | None]:
        """Of all blocks of the prefix cache. A copy."""
        return dict(self._cached)
