"""A restore: what lands when, what is verified, and how it ends."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from io_rig import BLOCK_BYTES, LAYOUT, WAIT_S, Rig, rig_of

from baton.ids import BlockId
from kvcache.tiers.interface import Restored, Rows, Slot
from kvcache.tiers.io.interface import IoSizes, VerifyDdr
from kvcache.tiers.io.restore import RestoreJob


def in_turn(*faults: str) -> Callable[[], str]:
    """The faults of the first calls; the others go well."""
    left = list(faults)
    return lambda: left.pop(0) if left else ""


def ended(job: RestoreJob) -> Restored:
    result = job.wait(WAIT_S)
    assert result is not None
    return result


def assert_holds(rig: Rig, contents: Sequence[int], places: Sequence[int]) -> None:
    for index, block in zip(contents, places, strict=True):
        assert rig.block(block) == rig.content(index), f"{index} in {block}"


class Gate:
    """A copier whose scatters of some layers, into some blocks, wait."""

    def __init__(self, rig: Rig, first_layer: int, blocks: range = range(1 << 30)) -> None:
        self._scatter = rig.io._copies._copier.scatter
        self._first_layer, self._blocks = first_layer, blocks
        self.reached, self.open = threading.Event(), threading.Event()
        rig.io._copies._copier.scatter = self.scatter  # type: ignore[method-assign]

    def scatter(self, layers: range, rows: Rows, slots: Sequence[Slot], blocks: Sequence[BlockId]) -> None:
        if layers.start >= self._first_layer and blocks[0] in self._blocks:
            self.reached.set()
            assert self.open.wait(WAIT_S)
        self._scatter(layers, rows, slots, blocks)


def test_blocks_of_both_tiers_land_where_they_should() -> None:
    with rig_of() as rig:
        rig.fill(list(range(20)))
        places = [40, 3, 17, 50, 51, 52, 53, 8, 9]
        tiers = ["ddr", "ssd", "ddr", "ddr", "ssd", "ssd", "ssd", "ddr", "ssd"]
        job = rig.io.restore([rig.part(t, i, p) for i, (t, p) in enumerate(zip(tiers, places, strict=True))])  # type: ignore[arg-type]
        result = ended(job)
        assert (result.good, result.reason) == (9, "")
        assert result.digests == tuple(rig.digests[:9])
        assert {timing.tier: timing.size_bytes for timing in result.timings} == {
            "ddr": 4 * BLOCK_BYTES,
            "ssd": 5 * BLOCK_BYTES,
        }
        assert job.layers == LAYOUT.layers and job.left_s == 0
        assert job.wait_layer(LAYOUT.layers - 1, 0)
        assert_holds(rig, range(9), places)
        assert job.read_headers[1] == rig.header(1) and job.read_headers[0] is None


def test_layers_land_in_order_and_each_is_waited_for() -> None:
    with rig_of(sizes=IoSizes(3 * BLOCK_BYTES, 1, 3 * BLOCK_BYTES)) as rig:
        rig.fill(list(range(8)))
        gate = Gate(rig, first_layer=2)
        job = rig.io.restore([rig.part("ddr", index, 40 + index) for index in range(8)])
        assert job.wait_layer(0, WAIT_S) and job.wait_layer(1, WAIT_S)
        assert gate.reached.wait(WAIT_S)
        assert not job.wait_layer(2, 0.0) and job.result is None and job.wait(0.0) is None
        assert job.layers == 2
        half = LAYOUT.block_bytes // 2
        assert all(rig.block(40 + index)[:half] == rig.content(index)[:half] for index in range(8))
        gate.open.set()
        assert job.wait_layer(3, WAIT_S)
        assert ended(job).good == 8


def test_no_layer_has_landed_before_what_the_disk_gives() -> None:
    with rig_of(faults=lambda: "hang") as rig:
        rig.fill(list(range(8)))
        job = rig.io.restore([rig.part("ssd" if index == 5 else "ddr", index, 40 + index) for index in range(8)])
        assert rig.file.hangs.wait(WAIT_S)
        assert ended_layers(rig, job) == 0
        rig.file.release()
        assert ended(job).good == 8


def ended_layers(rig: Rig, job: RestoreJob) -> int:
    """The job's layers once all that waits for nothing has been done."""
    probe = rig.io.restore([rig.part("ddr", 0, 60)])
    assert ended(probe).good == 1
    return job.layers


IN_GROUPS = IoSizes(3 * BLOCK_BYTES, BLOCK_BYTES, 3 * BLOCK_BYTES, read_bytes=BLOCK_BYTES // LAYOUT.layers)


def test_large_rows_come_from_the_disk_by_groups_of_layers() -> None:
    with rig_of(sizes=IN_GROUPS) as rig:
        rig.fill(list(range(6)))
        gate = Gate(rig, first_layer=2)
        job = rig.io.restore([rig.part("ssd", index, 40 + index) for index in range(6)])
        assert job.wait_layer(1, WAIT_S) and gate.reached.wait(WAIT_S)
        assert job.layers == 2 and job.result is None
        gate.open.set()
        assert ended(job).good == 6 and rig.file.calls == ["read"] * 2 + ["read on"] * 6
        assert_holds(rig, range(6), range(40, 46))


def test_a_slot_of_another_block_is_not_read_on() -> None:
    with rig_of(sizes=IN_GROUPS) as rig:
        rig.fill(list(range(6)))
        header, payload = rig.file.slots[Slot(2)]
        rig.file.slots[Slot(2)] = (replace(header, name=rig.names[20]), payload)
        job = rig.io.restore([rig.part("ssd", index, 40 + index) for index in range(6)])
        assert ended(job).good == 2 and job.corrupt == {2} and job.layers == 0
        assert len(rig.file.calls) <= 2 + 3, "what comes after it is not read, but it may have been asked for before"
        assert_holds(rig, range(2), (40, 41))


@pytest.mark.parametrize("flipped", range(4))
def test_a_flipped_bit_in_any_group_is_seen(flipped: int) -> None:
    with rig_of(sizes=IN_GROUPS, faults=in_turn(*[""] * flipped, "flip")) as rig:
        rig.fill(list(range(3)))
        job = rig.io.restore([rig.part("ssd", index, 40 + index) for index in range(3)])
        assert ended(job).good == 0 and job.corrupt == {0} and "digest" in job.result.reason  # type: ignore[union-attr]
        assert len(rig.file.calls) == LAYOUT.layers


def test_cancel_does_not_wait_for_a_disk_that_hangs() -> None:
    with rig_of(faults=lambda: "hang") as rig:
        rig.fill(list(range(8)))
        job = rig.io.restore([rig.part("ssd", index, 40 + index) for index in range(8)])
        assert rig.file.hangs.wait(WAIT_S)
        job.cancel()
        job.cancel()
        assert job.result == Restored(
            0, (), (), "It was given up, as whoever wanted it has gone or computes it sooner."
        )
        assert not job.wait_layer(0, WAIT_S)
        rig.poison(range(40, 48))
        rig.file.release()
        again = rig.io.restore([rig.part("ssd", 0, 50)])
        assert ended(again).good == 1
        assert all(rig.is_poisoned(block) for block in range(40, 48))
        assert rig.file.calls == ["read", "read"], "what waited was taken back"


def test_cancel_waits_for_the_copy_that_is_being_made() -> None:
    with rig_of() as rig:
        rig.fill([0])
        gate = Gate(rig, first_layer=0)
        job = rig.io.restore([rig.part("ddr", 0, 40)])
        assert gate.reached.wait(WAIT_S)
        cancelling = threading.Thread(target=job.cancel)
        cancelling.start()
        assert job.result is None
        gate.open.set()
        cancelling.join(WAIT_S)
        assert job.result is not None and job.result.good == 0


@pytest.mark.parametrize("tier", ["ddr", "ssd"])
def test_a_corrupt_block_ends_the_good_ones(tier: str) -> None:
    with rig_of() as rig:
        rig.fill(list(range(10)))
        rig.ddr.rows[6, 100] ^= 1
        header, payload = rig.file.slots[Slot(6)]
        rig.file.slots[Slot(6)] = (header, payload[:100] + bytes([payload[100] ^ 1]) + payload[101:])
        job = rig.io.restore([rig.part(tier, index, 40 + index) for index in range(10)])  # type: ignore[arg-type]
        result = ended(job)
        assert result.good == 6 and "digest" in result.reason
        assert result.digests == tuple(rig.digests[:6])
        assert job.corrupt == {6} and not job.has_disk_failed
        assert_holds(rig, range(6), range(40, 46))


def test_ddr_is_not_verified_where_it_should_not_be() -> None:
    with rig_of(verify_ddr="never") as rig:
        rig.fill([0, 1])
        rig.ddr.rows[1, 100] ^= 1
        assert ended(rig.io.restore([rig.part("ddr", index, 40 + index) for index in range(2)])).good == 2


def test_a_sample_of_ddr_is_verified_another_each_time() -> None:
    with rig_of(verify_ddr="sampled") as rig:
        rig.fill(list(range(16)))
        rig.ddr.rows[9, 100] ^= 1
        goods = [ended(rig.io.restore([rig.part("ddr", i, 40 + i) for i in range(16)])).good for _ in range(16)]
        assert sorted(goods) == [9] + [16] * 15


@pytest.mark.parametrize("change", ["name", "digest", "storage", "gone"])
def test_a_slot_that_holds_another_block_is_lost(change: str) -> None:
    with rig_of() as rig:
        rig.fill(list(range(5)))
        header, payload = rig.file.slots.pop(Slot(3))
        changed = {
            "name": replace(header, name=rig.names[20]),
            "digest": replace(header, digest=1),
            "storage": replace(header, storage="int8"),
        }
        if change in changed:
            rig.file.slots[Slot(3)] = (changed[change], payload)
        job = rig.io.restore([rig.part("ssd", index, 40 + index) for index in range(5)])
        result = ended(job)
        assert result.good == 3 and "does not hold" in result.reason and job.corrupt == {3}
        assert_holds(rig, range(3), range(40, 43))


def test_a_digest_that_only_the_slot_knows_is_taken_from_there() -> None:
    with rig_of() as rig:
        rig.fill([0, 1])
        result = ended(rig.io.restore([replace(rig.part("ssd", index, 40 + index), digest=None) for index in (0, 1)]))
        assert result.good == 2 and result.digests == tuple(rig.digests[:2])


def test_a_disk_that_fails_leaves_what_came_before() -> None:
    with rig_of(faults=in_turn("", "fail")) as rig:
        rig.fill(list(range(9)))
        job = rig.io.restore([rig.part("ssd", index, 40 + index) for index in range(9)])
        result = ended(job)
        assert job.has_disk_failed and not job.corrupt
        assert result.good in (0, 3), "what was being copied when the next call failed may count or not"
        assert "Input/output error" in result.reason
        assert rig.file.calls == ["read", "read"], "it is not asked again"


def test_a_run_that_starts_in_ddr_keeps_that_when_the_disk_fails() -> None:
    with rig_of(faults=lambda: "fail") as rig:
        rig.fill(list(range(9)))
        job = rig.io.restore([rig.part("ddr" if index < 4 else "ssd", index, 40 + index) for index in range(9)])
        assert ended(job).good == 4
        assert job.layers == 0 and not job.wait_layer(0, WAIT_S), "in all its blocks none has landed"
        assert_holds(rig, range(4), range(40, 44))


@pytest.mark.parametrize("tier", ["ddr", "ssd"])
@pytest.mark.parametrize("is_corrupt", [False, True])
def test_compressed_blocks_are_verified_as_stored_and_decoded(tier: str, is_corrupt: bool) -> None:
    with rig_of(compression="int8") as rig:
        assert rig.codec is not None
        slots = [Slot(index) for index in range(8)]
        digests = rig.io.offload_now([BlockId(index) for index in range(8)], slots, [None] * 8)
        for slot, digest in zip(slots, digests, strict=True):
            row = rig.ddr.rows[slot].copy()
            rig.file.slots[slot] = (rig.header(slot, digest, "int8"), row.tobytes())
        if is_corrupt:
            rig.ddr.rows[5, 40] ^= 2
            header, payload = rig.file.slots[Slot(5)]
            rig.file.slots[Slot(5)] = (header, payload[:40] + bytes([payload[40] ^ 2]) + payload[41:])
        parts = [replace(rig.part(tier, i, 40 + i, "int8"), digest=digests[i]) for i in range(8)]  # type: ignore[arg-type]
        result = ended(rig.io.restore(parts))
        assert result.good == (5 if is_corrupt else 8)
        assert result.digests == ()
        for index in range(result.good):
            landed = np.frombuffer(rig.block(40 + index), np.float32)
            assert np.abs(landed - np.frombuffer(rig.content(index), np.float32)).max() < 0.05


def test_left_s_goes_by_its_own_speed_or_what_is_known_of_the_tier() -> None:
    now_s = [0.0]
    with rig_of(sizes=IoSizes(8 * BLOCK_BYTES, 1, BLOCK_BYTES), verify_ddr="never", clock=lambda: now_s[0]) as rig:
        rig.fill(list(range(8)))
        gate = Gate(rig, first_layer=1)
        job = rig.io.restore([rig.part("ddr", index, 40 + index) for index in range(8)])
        assert job.wait_layer(0, WAIT_S) and gate.reached.wait(WAIT_S)
        assert job.left_s == pytest.approx(6 * BLOCK_BYTES / rig.io.speeds.bytes_per_s("ddr"))
        now_s[0] = 2.0
        assert job.left_s == pytest.approx(6.0)
        gate.open.set()
        assert ended(job).timings[0].seconds == 2.0


def test_what_it_waited_behind_others_does_not_make_it_slow() -> None:
    now_s = [0.0]
    with rig_of(sizes=IoSizes(16 * BLOCK_BYTES, 1, BLOCK_BYTES), verify_ddr="never", clock=lambda: now_s[0]) as rig:
        rig.fill(list(range(16)))
        before, within = Gate(rig, 0, range(40, 48)), Gate(rig, 1, range(50, 58))
        first = rig.io.restore([rig.part("ddr", index, 40 + index) for index in range(8)])
        second = rig.io.restore([rig.part("ddr", 8 + index, 50 + index) for index in range(8)])
        assert before.reached.wait(WAIT_S)
        now_s[0] = 2.0
        before.open.set()
        assert second.wait_layer(0, WAIT_S) and within.reached.wait(WAIT_S)
        now_s[0] = 2.5
        assert second.left_s == pytest.approx(1.5), "a quarter of it took half a second"
        within.open.set()
        assert ended(first).good == ended(second).good == 8


@pytest.mark.parametrize(("verify", "checked"), [("always", 32), ("sampled", 2), ("never", 0)])
def test_left_s_counts_the_verification_that_is_due(verify: VerifyDdr, checked: int) -> None:
    sizes = IoSizes(32 * BLOCK_BYTES, 32 * BLOCK_BYTES, BLOCK_BYTES)
    with rig_of(verify_ddr=verify, sizes=sizes, clock=lambda: 0.0) as rig:
        rig.fill(list(range(32)))
        reached, opened = threading.Event(), threading.Event()
        digests = rig.io._copies._digests

        def wait(blocks: Sequence[BlockId], layers: range) -> Sequence[int]:
            reached.set()
            assert opened.wait(WAIT_S)
            return digests(blocks, layers)

        rig.io._copies._digests = wait
        job = rig.io.restore([rig.part("ddr", index, 32 + index) for index in range(32)])
        if checked:
            assert reached.wait(WAIT_S) and job.wait_layer(LAYOUT.layers - 1, 0), "landed, not verified"
            assert job.result is None
            assert job.left_s == pytest.approx(rig.io.speeds.digest_s(checked * BLOCK_BYTES))
        opened.set()
        assert ended(job).good == 32 and job.left_s == 0


def test_restores_go_before_copies_down() -> None:
    with rig_of(faults=in_turn("hang")) as rig:
        rig.fill(list(range(8)))
        gate = Gate(rig, first_layer=0)
        stuck = rig.io.demote([Slot(0)], [Slot(0)], [rig.header(0)])
        first = rig.io.restore([rig.part("ddr", 0, 60)])
        assert rig.file.hangs.wait(WAIT_S) and gate.reached.wait(WAIT_S)
        down = rig.io.offload([BlockId(1)], [Slot(20)], [None])
        second = rig.io.restore([rig.part("ddr", index, 40 + index) for index in range(8)])
        order: list[str] = []
        original = rig.io._offload.copy

        def copy(*arguments: object) -> list[int | None]:
            order.append("restored" if second.layers == LAYOUT.layers else "not restored")
            return original(*arguments)  # type: ignore[arg-type]

        rig.io._offload.copy = copy  # type: ignore[method-assign]
        gate.open.set()
        assert down.wait(WAIT_S) and ended(first).good == 1 and ended(second).good == 8
        assert order == ["restored"]
        rig.file.release()
        assert stuck.wait(WAIT_S)


def test_it_wakes_as_layers_land_and_at_the_end() -> None:
    with rig_of(sizes=IoSizes(8 * BLOCK_BYTES, 1, BLOCK_BYTES)) as rig:
        rig.fill(list(range(8)))
        gate = Gate(rig, first_layer=2)
        job = rig.io.restore([rig.part("ddr", index, 40 + index) for index in range(8)])
        assert job.wait_layer(1, WAIT_S) and gate.reached.wait(WAIT_S)
        while not rig.wakes:  # told just after the lock is free, on another thread
            assert not job.wait(0.001)
        assert job.result is None
        before = len(rig.wakes)
        gate.open.set()
        assert ended(job).good == 8
        rig.io.close()
        assert len(rig.wakes) > before
