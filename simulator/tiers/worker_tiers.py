"""What lies below one simulated worker's pool: the real store and policy, over simulated devices."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from baton.errors import SettingsError
from baton.latency import Tier, WorkerLatency
from kvcache.eviction.policy import make_policy
from kvcache.restore_plan import RestoreCosts
from kvcache.tiers.interface import LowerTier
from kvcache.tiers.store import StoreShape, TierStore
from simulator.profile import Profile
from simulator.tiers.tier_io import HEADER_BYTES, SimulatedTierIo
from simulator.trace import TRACE_BLOCK_TOKENS
from simulator.virtual_time import VirtualTime


@dataclass(frozen=True, slots=True)
class TierSizes:
    """Of each worker; the fields are those of WorkerSettings."""

    ddr_bytes: int
    ssd_bytes: int = 0

    def __post_init__(self) -> None:
        if min(self.ddr_bytes, self.ssd_bytes) < 0:
            raise SettingsError("A tier's size cannot be negative.")
        if self.ssd_bytes and not self.ddr_bytes:
            raise SettingsError("An SSD needs host memory: blocks go down to it through --ddr-bytes.")

    def slots(self, profile: Profile) -> dict[LowerTier, int]:
        """How many blocks each tier holds. Raises SettingsError if one holds none, or the profile does not know it."""
        if profile.tiers is None:
            raise SettingsError(f"The profile of {profile.model} does not say how fast tiers below HBM are.")
        block_bytes = block_bytes_of(profile)
        slots: dict[LowerTier, int] = {"ddr": self.ddr_bytes // block_bytes}
        if self.ssd_bytes:
            slots["ssd"] = self.ssd_bytes // (block_bytes + HEADER_BYTES)
        for tier, count in slots.items():
            if not count:
                raise SettingsError(f"The {tier.upper()} tier has no room for one KV block of {block_bytes:,} bytes.")
        return slots


@dataclass(frozen=True, slots=True)
class TierUse:
    """What a tier has done, of one worker or of several."""

    restored_bytes: int
    """That came up out of it."""
    stored_bytes: int
    """That came down into it."""
    held_bytes_max: int
    """That one worker's held at most, with what was on its way into it."""
    limit_bytes: int
    """Of each worker's."""

    def beside(self, other: "TierUse") -> "TierUse":
        return TierUse(
            self.restored_bytes + other.restored_bytes,
            self.stored_bytes + other.stored_bytes,
            max(self.held_bytes_max, other.held_bytes_max),
            max(self.limit_bytes, other.limit_bytes),
        )


class WorkerTiers:
    def __init__(
        self,
        time: VirtualTime,
        sizes: TierSizes,
        profile: Profile,
        hbm_blocks: int,
        costs: Callable[[], RestoreCosts],
        seed: int,
    ) -> None:
        """`costs`: as the worker knows them by now."""
        self.layer_landed: Callable[[], None] = _nobody
        """Called when a restore has got on; the worker sets it."""
        slots, block_bytes, speeds = sizes.slots(profile), block_bytes_of(profile), profile.tiers
        assert speeds is not None
        self._held_max: dict[Tier, int] = dict.fromkeys(slots, 0)
        shape = StoreShape(
            hbm_blocks=hbm_blocks,
            ddr_slots=slots["ddr"],
            ssd_slots=slots.get("ssd", 0),
            block_bytes=block_bytes,
            row_bytes=block_bytes,
            storage="none",
            bytes_in_flight_max=max(speeds.bytes_in_flight_max, block_bytes),
        )

        def start(wake: Callable[[], None]) -> SimulatedTierIo:
            self._io = SimulatedTierIo(time, speeds, profile.layers, block_bytes, wake, lambda: self.layer_landed())
            return self._io

        self.store = TierStore(
            shape,
            start,
            make_policy(hbm_blocks + sum(slots.values())),
            lambda depth: costs().block_s(depth),
            np.random.default_rng(seed),
            clock=time,
            wall_clock=time,
        )

    def take_stall_s(self) -> float:
        return self._io.take_stall_s()

    def note_held(self) -> None:
        """Between two steps."""
        for state in self.store.states():
            held = state.size_bytes + state.arriving_bytes
            self._held_max[state.tier] = max(self._held_max[state.tier], held)

    def uses(self) -> dict[Tier, TierUse]:
        restored = self._io.restored_bytes
        return {
            state.tier: TierUse(
                restored[state.tier],
                state.stored_bytes,
                self._held_max[state.tier],
                state.size_bytes_max,
            )
            for state in self.store.states()
        }


def block_bytes_of(profile: Profile) -> int:
    return profile.kv_token_bytes * TRACE_BLOCK_TOKENS


def latency_with_tiers(profile: Profile, sizes: TierSizes | None) -> WorkerLatency:
    """What a worker publishes, until it has measured."""
    if sizes is None or profile.tiers is None:
        return profile.latency
    return replace(profile.latency, restore={tier: profile.tiers.of(tier).restore for tier in sizes.slots(profile)})


def _nobody() -> None:
    pass
