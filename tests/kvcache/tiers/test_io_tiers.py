"""What goes down, what the file is told, and that it ends."""

import logging
import threading
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest
from io_rig import BLOCK_BYTES, LAYOUT, WAIT_S, rig_of

from baton.ids import BlockId
from kvcache.tiers.interface import Slot, SlotHeader
from kvcache.tiers.io.restore_copies import stored_digests


def slots(*numbers: int) -> list[Slot]:
    return [Slot(number) for number in numbers]


def blocks(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


def in_turn(*faults: str) -> Callable[[], str]:
    """The faults of the first calls; the others go well."""
    left = list(faults)
    return lambda: left.pop(0) if left else ""


def test_offloaded_blocks_lie_in_their_rows_with_digests() -> None:
    with rig_of() as rig:
        known = [rig.digests[9], None, None, rig.digests[4], None, None, None]
        job = rig.io.offload(blocks(9, 3, 5, 4, 20, 21, 22), slots(1, 0, 7, 2, 10, 11, 12), known)
        assert job.wait(WAIT_S) and job.error is None
        assert job.result == [rig.digests[block] for block in (9, 3, 5, 4, 20, 21, 22)]
        for block, slot in ((9, 1), (3, 0), (5, 7), (4, 2), (20, 10), (22, 12)):
            assert rig.ddr.rows[slot].tobytes() == rig.content(block)


def test_offload_now_does_the_same_at_once() -> None:
    with rig_of() as rig:
        assert rig.io.offload_now(blocks(2, 1), slots(5, 6), [None, 77]) == [rig.digests[2], 77]
        assert rig.ddr.rows[6].tobytes() == rig.content(1)
        assert rig.io.offload_now([], [], []) == []


def test_compressed_blocks_have_digests_of_what_is_stored() -> None:
    with rig_of(compression="int8") as rig:
        assert rig.codec is not None
        poisoned = np.frombuffer(rig.memory, np.float32)
        poisoned[LAYOUT.slice_offset(1, 0, 3) // 4] = np.inf
        job = rig.io.offload(blocks(2, 3, 4), slots(7, 8, 9), [rig.digests[2], None, None])
        assert job.wait(WAIT_S) and job.error is None
        stored = stored_digests(rig.ddr.rows, slots(7, 9), rig.codec.stored_bytes)
        assert job.result == [stored[0], None, stored[1]], "an infinite number cannot be compressed"


def test_bytes_in_flight_are_counted_until_the_job_has_ended() -> None:
    with rig_of(faults=in_turn("hang"), bytes_max=5 * BLOCK_BYTES) as rig:
        rig.fill([0, 1, 2])
        assert rig.io.bytes_in_flight == 0
        job = rig.io.demote(slots(0, 1, 2), slots(10, 11, 12), [rig.header(index) for index in range(3)])
        assert rig.io.bytes_in_flight == 3 * BLOCK_BYTES
        assert rig.io.has_room_for(2 * BLOCK_BYTES) and not rig.io.has_room_for(2 * BLOCK_BYTES + 1)
        with pytest.raises(AssertionError, match="asks before"):
            rig.io.offload(blocks(1, 2, 3), slots(1, 2, 3), [None] * 3)
        rig.file.release()
        assert job.wait(WAIT_S) and job.error is None
        assert rig.io.bytes_in_flight == 0
        assert rig.file.slots[Slot(11)] == (rig.header(1), rig.content(1))


def test_copies_down_are_timed_by_tier() -> None:
    seconds = count()
    with rig_of(clock=lambda: float(next(seconds))) as rig:
        rig.io.offload_now(blocks(0), slots(0), [None])
        assert rig.io.down_s == {"ddr": 1.0, "ssd": 0.0}
        assert rig.io.offload(blocks(1), slots(1), [None]).wait(WAIT_S)
        assert rig.io.demote(slots(0), slots(5), [rig.header(0)]).wait(WAIT_S)
        assert rig.io.down_s == {"ddr": 2.0, "ssd": 1.0}


def test_a_job_of_nothing_has_ended() -> None:
    with rig_of() as rig:
        assert rig.io.offload([], [], []).is_done
        assert rig.io.restore([]).result is not None


def test_a_failed_write_fails_its_job_and_no_other() -> None:
    with rig_of(faults=in_turn("fail")) as rig:
        rig.fill([0, 1])
        failed = rig.io.demote(slots(0), slots(0), [rig.header(0)])
        other = rig.io.demote(slots(1), slots(40), [rig.header(1)])
        assert failed.wait(WAIT_S) and other.wait(WAIT_S)
        assert failed.error is not None and failed.error.strerror == "Input/output error"
        assert other.error is None and Slot(40) in rig.file.slots


def test_a_slot_is_erased_and_written_in_the_order_asked_for() -> None:
    with rig_of(faults=in_turn("hang")) as rig:
        rig.fill([0, 1])
        first = rig.io.demote(slots(0), slots(30), [rig.header(0)])
        jobs = [rig.io.erase(slots(1, 30)), rig.io.demote(slots(1), slots(1), [rig.header(1)])]
        assert rig.file.hangs.wait(WAIT_S) and rig.io.offload(blocks(5), slots(5), [None]).wait(WAIT_S)
        assert rig.file.calls == ["write"], "one at a time"
        rig.file.release()
        assert all(job.wait(WAIT_S) and job.error is None for job in (first, *jobs))
        assert sorted(rig.file.slots) == [0, 1]
        assert rig.file.at_once_max == 1


def test_copies_down_get_on_while_the_disk_hangs() -> None:
    with rig_of(faults=lambda: "hang") as rig:
        rig.fill([0, 1])
        stuck = rig.io.demote(slots(0), slots(0), [rig.header(0)])
        waiting = rig.io.erase(slots(1))
        job = rig.io.offload(blocks(5), slots(5), [None])
        assert job.wait(WAIT_S) and not stuck.is_done and not waiting.is_done
        restore = rig.io.restore([rig.part("ddr", 1, 40)])
        result = restore.wait(WAIT_S)
        assert result is not None and result.good == 1


def test_scan_tells_what_the_file_holds() -> None:
    with rig_of() as rig:
        rig.fill([3, 5])
        found: dict[Slot, SlotHeader] = {}
        job = rig.io.scan(lambda slot, header: found.update({slot: header}))
        assert job.wait(WAIT_S) and job.error is None
        assert found == {Slot(3): rig.header(3), Slot(5): rig.header(5)}


def test_a_scan_that_fails_says_so() -> None:
    def fail(_: Slot, __: SlotHeader) -> None:
        raise OSError(5, "Input/output error")

    with rig_of() as rig:
        rig.fill([3])
        job = rig.io.scan(fail)
        assert job.wait(WAIT_S) and job.error is not None


def test_close_stops_a_scan() -> None:
    with rig_of() as rig:
        rig.fill(list(range(60)))
        seen = threading.Event()
        told: list[Slot] = []

        def found(slot: Slot, _: SlotHeader) -> None:
            told.append(slot)
            seen.set()
            while rig.io._threads.give_way():  # until it is closing
                pass

        job = rig.io.scan(found)
        assert seen.wait(WAIT_S)
        assert rig.io.close()
        assert job.is_done and told == [Slot(0)]


def test_run_does_something_short() -> None:
    with rig_of() as rig:
        job = rig.io.run(lambda: threading.current_thread().name)
        assert job.wait(WAIT_S) and job.result[0].startswith("kv-io")


def test_a_bug_fails_its_job_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ValueError("a bug")

    with rig_of() as rig, caplog.at_level(logging.ERROR):
        job = rig.io.run(broken)
        assert job.wait(WAIT_S) and job.error is not None and "ValueError" in str(job.error)
        assert "did not expect" in caplog.text
        again = rig.io.run(lambda: 1)
        assert again.wait(WAIT_S) and again.result == [1]


def test_close_fails_what_waits_and_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.tiers.io.tier_io.CLOSE_S", 0.05)
    with rig_of(faults=in_turn("hang")) as rig:
        rig.fill([0, 1])
        stuck = rig.io.demote(slots(0), slots(0), [rig.header(0)])
        assert rig.file.hangs.wait(WAIT_S)
        waiting = rig.io.demote(slots(1), slots(1), [rig.header(1)])
        restore = rig.io.restore([rig.part("ssd", 1, 40)])
        assert not rig.io.close(), "a thread is in the disk"
        assert stuck.error is not None and waiting.error is not None
        assert restore.result is not None and restore.result.good == 0
        assert rig.io.bytes_in_flight == 0
        late, late_restore = rig.io.offload(blocks(1), slots(1), [None]), rig.io.restore([rig.part("ddr", 1, 40)])
        assert late.is_done and late.error is not None
        assert late_restore.result is not None and late_restore.result.good == 0
        monkeypatch.undo()


def test_it_wakes_when_a_job_has_ended() -> None:
    with rig_of() as rig:
        job = rig.io.offload(blocks(1), slots(1), [None])
        assert job.wait(WAIT_S)
        rig.io.close()
        assert rig.wakes
