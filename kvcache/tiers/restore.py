"""How far one restore has got: what the engine waits for, and the I/O threads tell."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvcache.tiers.interface import LowerTier, Restored, RestoreTiming, SlotHeader
from kvcache.tiers.restore_pieces import LayerCount, RestorePiece, RestorePlan
from kvcache.tiers.tier_speeds import TierSpeeds


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
        self._begun_s = clock()
        self._changed = threading.Condition()
        self._count = LayerCount(plan.pieces, plan.layers)
        self._layers = 0
        self._left = len(plan.pieces) + len(plan.late_checks)
        self._copies_left = len(plan.pieces)
        self._late = {position for some in plan.late_checks for position in some}
        self._landed_bytes = [0] * len(plan.parts)
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
            self._fail("The restore was cancelled.")
            self._end()
        self._on_cancel()
        self._wake()

    @property
    def left_s(self) -> float:
        with self._changed:
            if self._result is not None:
                return 0.0
            landed, total = self._by_tier(self._landed_bytes), self._by_tier([self.plan.row_bytes] * self._parts)
            unsure_bytes = sum(not self._sure[at] for at in self._late) * self.plan.row_bytes
        elapsed_s = self._clock() - self._begun_s
        return self._speeds.digest_s(unsure_bytes) + sum(
            (total[tier] - landed[tier]) / self._speed(tier, landed[tier], elapsed_s) for tier in total
        )

    def _speed(self, tier: LowerTier, landed_bytes: int, elapsed_s: float) -> float:
        own = landed_bytes / elapsed_s if elapsed_s > 0 else 0.0
        return own or self._speeds.bytes_per_s(tier)

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
                if at not in self._late and self._landed_bytes[at] >= self.plan.row_bytes:
                    self._sure[at] = True
            spent = self._spent[self.plan.parts[positions[0]].tier]
            spent.size_bytes += size * len(positions)
            spent.last_s = self._clock()

    def verified(self, positions: Sequence[int]) -> None:
        """Those of the late checks that were right."""
        with self._changed:
            if self._is_over:
                return
            for at in positions:
                self._sure[at] = True
                self._spent[self.plan.parts[at].tier].last_s = self._clock()

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

    def copy_ended(self, piece: RestorePiece) -> bool:
        """Ended, whatever came of it. Whether it was the last and the late checks are due."""
        with self._changed:
            if self._is_over:
                return False
            self._copies_left -= 1
            before = self._layers
            self._count.landed(piece)
            if not self._reason:
                self._layers = self._count.layers
            is_news = self._layers > before
            if is_news:
                self._changed.notify_all()
            is_due = not self._copies_left and bool(self.plan.late_checks)
        has_ended = self._step_ended()
        if is_news and not has_ended:
            self._wake()
        return is_due

    def check_ended(self) -> None:
        with self._changed:
            if self._is_over:
                return
        self._step_ended()

    def _step_ended(self) -> bool:
        with self._changed:
            self._left -= 1
            if self._left or self._is_over:
                return False
            self._end()
        self._wake()
        return True

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
