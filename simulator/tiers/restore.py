"""A restore in virtual time: layer by layer, from both tiers at once."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from baton.clock import Clock
from baton.latency import TransferCost
from kvcache.tiers.interface import LowerTier, Restored, RestoreTiming
from kvcache.tiers.io.interface import RestorePart
from simulator.tiers.device import Device, Haul

GIVEN_UP = "It was given up, as whoever wanted it has gone or computes it sooner."
DIGEST = 1
"""Blocks without content all have the same."""


class SimulatedRestore:
    """Implements kvcache.tiers.moves.store_io.RunningRestore. Nothing of it is ever corrupt, and no disk fails."""

    corrupt: frozenset[int] = frozenset()
    has_disk_failed = False

    def __init__(
        self,
        parts: Sequence[RestorePart],
        layers: int,
        block_bytes: int,
        costs: Mapping[LowerTier, TransferCost],
        clock: Clock,
        on_layer: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self.tiers: tuple[LowerTier, ...] = tuple(part.tier for part in parts)
        """Of its blocks, in the prompt's order."""
        self._layers, self._costs, self._clock, self._on_end = layers, costs, clock, on_end
        self._size_bytes = {tier: blocks * block_bytes for tier, blocks in Counter(self.tiers).items()}
        self._hauls = {
            tier: Haul(costs[tier].time_s(size), self._tier_ended, layers, on_layer)
            for tier, size in self._size_bytes.items()
        }
        self._devices: Mapping[LowerTier, Device] = {}
        self._result: Restored | None = None

    def begin(self, devices: Mapping[LowerTier, Device]) -> None:
        self._devices = devices
        for tier, haul in self._hauls.items():
            devices[tier].bring_up(haul)

    # ---- for the engine

    @property
    def layers(self) -> int:
        return min(haul.landed for haul in self._hauls.values())

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        """Nobody waits in virtual time: whoever may have to comes again later."""
        del timeout_s
        return self.layers > layer

    @property
    def result(self) -> Restored | None:
        return self._result

    def wait(self, timeout_s: float) -> Restored | None:
        del timeout_s
        return self._result

    @property
    def left_s(self) -> float:
        """As the real one reckons: by each tier's speed up to now, one after the other."""
        return 0.0 if self._result is not None else sum(map(self._left_s, self._hauls))

    def _left_s(self, tier: LowerTier) -> float:
        landed, began_s = self._landed_bytes(tier), self._hauls[tier].began_s
        elapsed_s = 0.0 if began_s is None else self._clock() - began_s
        own = landed / elapsed_s if elapsed_s > 0 else 0.0
        return (self._size_bytes[tier] - landed) / (own or self._costs[tier].bytes_per_s)

    @property
    def lands_s(self) -> float:
        """By the clock, when the last layer will have landed. Once the first one has, it is known: what comes up is
        held up by nothing then."""
        return max(haul.end_s for tier, haul in self._hauls.items() if haul.landed < haul.parts)

    def cancel(self) -> None:
        if self._result is None:
            for tier, haul in self._hauls.items():
                if haul.landed < haul.parts:
                    self._devices[tier].drop(haul)
            self._end(GIVEN_UP)

    # ---- how it ends

    def _tier_ended(self) -> None:
        if self.layers == self._layers:
            self._end("")

    def _end(self, reason: str) -> None:
        whole = {tier for tier, haul in self._hauls.items() if haul.landed == haul.parts}
        good = next((at for at, tier in enumerate(self.tiers) if tier not in whole), len(self.tiers))
        self._result = Restored(good, (DIGEST,) * good, tuple(map(self._timing, self._landed())), reason)
        self._on_end()

    def _landed(self) -> list[LowerTier]:
        return [tier for tier, haul in self._hauls.items() if haul.landed]

    def _landed_bytes(self, tier: LowerTier) -> int:
        haul = self._hauls[tier]
        return self._size_bytes[tier] * haul.landed // haul.parts

    def _timing(self, tier: LowerTier) -> RestoreTiming:
        """Without what it waited behind others."""
        seconds = self._costs[tier].time_s(self._size_bytes[tier]) * self._hauls[tier].landed / self._layers
        return RestoreTiming(tier, self._landed_bytes(tier), seconds)
