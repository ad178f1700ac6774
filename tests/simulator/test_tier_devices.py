"""Devices, restores and copies down in virtual time: who goes first, and how long it takes."""

from collections.abc import Sequence

from baton.ids import BlockHash, BlockId
from baton.latency import TransferCost
from kvcache.tiers.interface import LowerTier, Slot
from kvcache.tiers.io.interface import RestorePart
from simulator.profile import TierProfile, TierSpeed
from simulator.tiers.device import Device, Haul
from simulator.tiers.restore import SimulatedRestore
from simulator.tiers.tier_io import SimulatedTierIo
from simulator.virtual_time import VirtualTime

BLOCK_BYTES, LAYERS = 1000, 4
DDR = TransferCost(latency_s=0.0, bytes_per_s=1000.0)
SSD = TransferCost(latency_s=0.5, bytes_per_s=500.0)
SPEEDS = TierProfile(
    ddr=TierSpeed(restore=DDR, store=DDR), ssd=TierSpeed(restore=SSD, store=SSD), bytes_in_flight_max=10_000
)


class Rig:
    """A device; what ended on it, and when."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        self.device = Device(self.time)
        self.ended: list[tuple[str, float]] = []

    def haul(self, name: str, seconds: float, parts: int = 1) -> Haul:
        return Haul(
            seconds,
            lambda: self.ended.append((name, self.time.now_s)),
            parts,
            lambda: self.ended.append((f"{name}, a part", self.time.now_s)),
        )


def test_a_device_does_one_thing_after_the_other_in_equal_parts() -> None:
    rig = Rig()
    rig.device.bring_up(rig.haul("first", 2.0, parts=2))
    rig.device.bring_up(rig.haul("second", 1.0))
    rig.time.run()
    assert rig.ended == [("first, a part", 1.0), ("first", 2.0), ("second", 3.0)]


def test_what_goes_down_stops_while_something_comes_up() -> None:
    rig = Rig()
    rig.device.take_down(rig.haul("down", 4.0))
    rig.device.take_down(rig.haul("more", 1.0))
    rig.time.at(1.0, lambda: rig.device.bring_up(rig.haul("up", 2.0)))
    rig.time.run()
    assert rig.ended == [("up", 3.0), ("down", 6.0), ("more", 7.0)]


def test_what_is_dropped_makes_room_for_the_next() -> None:
    rig = Rig()
    unwanted = rig.haul("unwanted", 10.0)
    rig.device.bring_up(unwanted)
    rig.device.bring_up(rig.haul("next", 1.0))
    rig.time.at(2.0, lambda: rig.device.drop(unwanted))
    rig.time.run()
    assert rig.ended == [("next", 3.0)]
    assert unwanted.landed == 0


class Io:
    """An I/O, and when it called."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        self.woken_s: list[float] = []
        self.layers_s: list[float] = []
        self.io = SimulatedTierIo(
            self.time,
            SPEEDS,
            LAYERS,
            BLOCK_BYTES,
            lambda: self.woken_s.append(self.time.now_s),
            lambda: self.layers_s.append(self.time.now_s),
        )

    def restore(self, *tiers: LowerTier) -> SimulatedRestore:
        return self.io.restore([part(at, tier) for at, tier in enumerate(tiers)])


def part(at: int, tier: LowerTier) -> RestorePart:
    return RestorePart(tier, Slot(at), BlockHash(bytes([at]) * 16), 1, "none", BlockId(at))


def slots(count: int) -> Sequence[Slot]:
    return [Slot(at) for at in range(count)]


def test_a_restore_comes_layer_by_layer() -> None:
    rig = Io()
    restore = rig.restore("ddr", "ddr")
    seen = []
    for at_s in (0.1, 0.6, 1.6, 2.1):
        rig.time.at(at_s, lambda: seen.append((restore.layers, restore.result is not None)))
    rig.time.at(1.25, lambda: seen.append((restore.left_s, restore.lands_s)))
    rig.time.run()
    assert seen == [(0, False), (1, False), (1.25, 2.0), (3, False), (4, True)]
    assert rig.layers_s == [0.5, 1.0, 1.5] and rig.woken_s == [2.0]
    assert restore.result is not None
    assert (restore.result.good, restore.result.reason) == (2, "")
    (timing,) = restore.result.timings
    assert (timing.tier, timing.size_bytes, timing.seconds) == ("ddr", 2000, 2.0)
    assert rig.io.restored_bytes == {"ddr": 2000}


def test_both_tiers_bring_up_at_once_and_the_slower_one_counts() -> None:
    rig = Io()
    restore = rig.restore("ddr", "ssd", "ddr")
    rig.time.at(2.0, lambda: rig.layers_s.append(restore.layers))
    rig.time.run()
    assert rig.woken_s == [SSD.time_s(1000)]
    assert rig.layers_s[-2] < SSD.time_s(1000) and restore.layers == LAYERS
    assert restore.tiers == ("ddr", "ssd", "ddr")


def test_who_waits_behind_another_is_not_slower_for_it() -> None:
    rig = Io()
    rig.restore("ddr", "ddr")
    second = rig.restore("ddr")
    rig.time.run()
    assert rig.woken_s == [2.0, 3.0]
    assert second.result is not None and second.result.timings[0].seconds == 1.0


def test_a_restore_that_is_given_up_keeps_what_was_whole_before_it() -> None:
    rig = Io()
    restore = rig.restore("ddr", "ssd", "ddr")
    behind = rig.restore("ssd")
    rig.time.at(2.2, restore.cancel)
    rig.time.run()
    assert restore.result is not None
    assert restore.result.good == 1, "the first block, and not the last, which follows on one that is not there"
    assert restore.result.reason
    assert rig.woken_s == [2.2, 2.2 + SSD.time_s(1000)], "the next one has the disk at once"
    assert behind.result is not None and behind.result.good == 1
    restore.cancel()
    assert len(rig.woken_s) == 2, "it has ended already"


def test_what_goes_down_is_counted_until_it_is_there() -> None:
    rig = Io()
    offload = rig.io.offload([BlockId(0), BlockId(1)], slots(2), [None, None])
    demotion = rig.io.demote(slots(1), slots(1), [])
    assert rig.io.bytes_in_flight == 3000 and not offload.is_done
    rig.time.run()
    assert offload.is_done and demotion.is_done and rig.io.bytes_in_flight == 0
    assert offload.result == [1, 1]
    assert rig.io.down_s == {"ddr": 2.0, "ssd": SSD.time_s(1000)}


def test_a_copy_at_once_holds_up_the_engine() -> None:
    rig = Io()
    rig.io.offload_now([BlockId(0)] * 3, slots(3), [None] * 3)
    assert rig.io.take_stall_s() == 3.0
    assert rig.io.take_stall_s() == 0.0
