"""How far one restore has got: what the engine waits for, and the I/O threads tell."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from baton.digest import sum_of
from kvcache.tiers.interface import LowerTier, Restored, RestoreTiming, SlotHeader
from kvcache.tiers.io.restore_pieces import LayerCount, RestorePlan
from kvcache.tiers.io.speeds import TierSpeeds

CORRUPT = "A block was not what was stored: its digest is another."


@dataclass(slots=True)
class Spent:
    """What one tier has given so far, and between when and when."""

    size_bytes: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


class RestoreJob:
    """Implements Restore. All its blocks are the engine's until it has begun, the I/O threads' while it runs, and the
    engine's again from the moment that it has ended: they are written only inside `writing`.

    A block is *sure* when it has landed whole and, if it is one to be verified, was right; a part that cannot be had is
    *lost*, and from then on what comes after it is skipped.
    """

    def __init__(
        self,
        plan: RestorePlan,
        speeds: TierSpeeds,
        clock: Callable[[], float],
        wake: Callable[[], None],
        on_cancel: Callable[[], None],
    ) -> None:
        """`on_cancel`: to take back what waits. `wake`: a layer has landed, or it has ended."""
        self.plan = plan
        self.read_headers: list[SlotHeader | None] = [None] * len(plan.parts)
        """By position, of what came from the SSD: what its slots said."""
        self.corrupt: set[int] = set()
        """Positions that were read, or lay there, and were not what was stored."""
        self.has_disk_failed = False
        self._speeds = speeds
        self._clock = clock
        self._wake = wake
        self._on_cancel = on_cancel
        self._changed = threading.Condition()
        self._count = LayerCount(plan.pieces, plan.layers)
        self._layers = 0
        self._left = len(plan.pieces)
        self._landed_bytes = [0] * len(plan.parts)
        self._digested_layers = [0] * len(plan.parts)
        self._digest_sums = [0] * len(plan.parts)
        self._sure = [False] * len(plan.parts)
        self._good_max = len(plan.parts)
        """Positions from here on are lost, or follow on one that is."""
        self._reason = ""
        self._writers = 0
        self._is_cancelled = False
        self._spent: dict[LowerTier, Spent] = {}
        self._result: Restored | None = None
        if not self._left:
            with self._changed:
                self._end()

    # ---- the engine's side

    @property
    def layers(self) -> int:
        return self._layers

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._layers > layer or self._result is not None, timeout_s)
            return self._layers > layer

    @property
    def result(self) -> Restored | None:
        return self._result

    def wait(self, timeout_s: float) -> Restored | None:
        with self._changed:
            self._changed.wait_for(lambda: self._result is not None, timeout_s)
            return self._result

    def cancel(self) -> None:
        with self._changed:
            if self._result is not None:
                return
            self._is_cancelled = True
            self._changed.wait_for(lambda: not self._writers)  # one piece's memcpy
            self._fail("It was given up, as whoever wanted it has gone or computes it sooner.")
            self._end()
        self._on_cancel()
        self._wake()

    @property
    def left_s(self) -> float:
        with self._changed:
            if self._result is not None:
                return 0.0
            landed, total = self._by_tier(self._landed_bytes), self._by_tier([self.plan.row_bytes] * self._parts)
            undigested_bytes = sum(map(self._undigested_bytes, self.plan.pool_checks))
            speeds = {tier: self._speed(tier, landed[tier]) for tier in total}
        return self._speeds.digest_s(undigested_bytes) + sum(
            (total[tier] - landed[tier]) / speeds[tier] for tier in total
        )

    def _undigested_bytes(self, position: int) -> int:
        """Of what has landed: a speed includes the digests."""
        layer_bytes = self.plan.row_bytes // self.plan.layers
        return self._landed_bytes[position] - self._digested_layers[position] * layer_bytes

    def _speed(self, tier: LowerTier, landed_bytes: int) -> float:
        """Its own since its first piece, for until then it waited behind others; else what is usual."""
        elapsed_s = self._clock() - self._spent[tier].first_s if landed_bytes else 0.0
        return landed_bytes / elapsed_s if elapsed_s > 0 else self._speeds.bytes_per_s(tier)

    def _by_tier(self, sizes: Sequence[int]) -> dict[LowerTier, int]:
        sums: dict[LowerTier, int] = {}
        for part, size in zip(self.plan.parts, sizes, strict=True):
            sums[part.tier] = sums.get(part.tier, 0) + size
        return sums

    # ---- the I/O threads' side

    def wanted(self, positions: Iterable[int]) -> list[int]:
        """Those of them that are still worth bringing up."""
        with self._changed:
            return [] if self._is_over else [at for at in positions if at < self._good_max]

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Whether its blocks may be written; if so, they may be inside. Keep it short: `cancel` waits for it."""
        with self._changed:
            may_write = not self._is_over
            self._writers += may_write
        try:
            yield may_write
        finally:
            with self._changed:
                self._writers -= may_write
                if not self._writers:
                    self._changed.notify_all()

    def begun(self, tier: LowerTier) -> None:
        """A piece of that tier is being worked on."""
        with self._changed:
            now_s = self._clock()
            self._spent.setdefault(tier, Spent(first_s=now_s, last_s=now_s))

    def landed(self, positions: Sequence[int], layers: range) -> None:
        """These layers of these parts are in the pool."""
        size = self.plan.row_bytes // self.plan.layers * len(layers)
        with self._changed:
            if self._is_over or not positions:
                return
            for at in positions:
                self._landed_bytes[at] += size
                self._sure[at] = self._landed_bytes[at] == self.plan.row_bytes and at not in self.plan.pool_checks
            spent = self._spent[self.plan.parts[positions[0]].tier]
            spent.size_bytes += size * len(positions)
            spent.last_s = self._clock()
            is_news = self._count_layers(positions, layers)
        if is_news:
            self._wake()

    def _count_layers(self, positions: Sequence[int], layers: range) -> bool:
        """With the lock held. Whether more of the lowest layers have landed."""
        before = self._layers
        self._count.landed(layers, len(positions))
        if not self._reason:
            self._layers = self._count.layers
        if self._layers > before:
            self._changed.notify_all()
        return self._layers > before

    def digested(self, positions: Sequence[int], layers: range, digests: Sequence[int]) -> None:
        """What these layers add to the digests of parts that are verified in the pool."""
        with self._changed:
            if self._is_over:
                return
            for at, digest in zip(positions, digests, strict=True):
                self._digested_layers[at] += len(layers)
                self._digest_sums[at] = sum_of(self._digest_sums[at], digest)
            whole = [at for at in positions if self._digested_layers[at] == self.plan.layers]
            wrong = [at for at in whole if self._digest_sums[at] != self.digest(at)]
            for at in whole:
                self._sure[at] = at not in wrong
            self._spent[self.plan.parts[positions[0]].tier].last_s = self._clock()
            self.lost(wrong, CORRUPT, is_corrupt=True)

    def headed(self, position: int, header: SlotHeader | None) -> bool:
        """What its slot on the SSD said. Whether that is the block that it should hold."""
        self.read_headers[position] = header
        part = self.plan.parts[position]
        return header is not None and header.storage == part.storage and part.digest in (None, header.digest)

    def digest(self, position: int) -> int | None:
        """What the part must have."""
        header = self.read_headers[position]
        return header.digest if header else self.plan.parts[position].digest

    def lost(self, positions: Sequence[int], reason: str, *, is_corrupt: bool = False) -> None:
        """The parts at these positions cannot be had, or are not what they should be."""
        with self._changed:
            if positions and not self._is_over:
                self.corrupt.update(positions if is_corrupt else ())
                self._good_max = min(self._good_max, *positions)
                self._fail(reason)

    def lost_tier(self, tier: LowerTier, reason: str) -> None:
        """All that has not landed yet of what the tier was to give."""
        parts, row_bytes = self.plan.parts, self.plan.row_bytes
        with self._changed:
            left = [i for i, part in enumerate(parts) if part.tier == tier and self._landed_bytes[i] < row_bytes]
        self.has_disk_failed |= tier == "ssd"
        self.lost(left, reason)

    def piece_ended(self) -> None:
        """Whatever came of it."""
        with self._changed:
            self._left -= 1
            if self._left or self._is_over:
                return
            self._end()
        self._wake()

    # ---- with the lock held

    @property
    def _is_over(self) -> bool:
        return self._is_cancelled or self._result is not None

    @property
    def _parts(self) -> int:
        return len(self.plan.parts)

    def _fail(self, reason: str) -> None:
        self._reason = self._reason or reason

    def _end(self) -> None:
        good = self._sure.index(False) if False in self._sure else self._parts
        timings = tuple(
            RestoreTiming(tier, spent.size_bytes, spent.last_s - spent.first_s)
            for tier, spent in self._spent.items()
            if spent.size_bytes
        )
        self._speeds.learn(timings)
        self._result = Restored(good, self._digests(good), timings, "" if good == self._parts else self._reason)
        self._changed.notify_all()

    def _digests(self, good: int) -> tuple[int, ...]:
        """As the blocks in the pool have them: not of stored bytes that were compressed."""
        if any(part.storage != "none" for part in self.plan.parts[:good]):
            return ()
        return tuple(digest for at in range(good) if (digest := self.digest(at)) is not None)
