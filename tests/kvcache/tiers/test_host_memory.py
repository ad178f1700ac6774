"""Rows of host memory start on pages, are zero, and outlive their owner for as long as somebody looks at them."""

import os

import numpy as np
import psutil
import pytest

from kvcache.tiers.rows.host_memory import HostMemory


@pytest.mark.parametrize(("row_bytes", "stride"), [(1, 4096), (4096, 4096), (4097, 8192), (65_792, 69_632)])
def test_rows_start_on_pages(row_bytes: int, stride: int) -> None:
    memory = HostMemory(3, row_bytes)
    assert memory.rows.shape == (3, row_bytes) and memory.rows.strides == (stride, 1)
    assert memory.rows.ctypes.data % 4096 == 0 and memory.stride == stride
    assert memory.size_bytes == 3 * stride
    assert not memory.rows.any() and memory.rows.flags.writeable
    memory.close()


def test_rows_are_apart() -> None:
    memory = HostMemory(4, 5000)
    memory.rows[:] = np.arange(4, dtype=np.uint8)[:, None]
    assert (memory.rows == np.arange(4)[:, None]).all()
    memory.close()


def test_views_outlive_it() -> None:
    memory = HostMemory(2, 4096)
    row = memory.rows[1]
    row[:] = 7
    memory.close()
    memory.close()
    assert (row == 7).all()
    assert len(memory.rows) == 0


def test_memory_is_taken_when_it_is_touched() -> None:
    size_bytes = 64 * 2**20
    before = psutil.Process(os.getpid()).memory_info().rss
    memory = HostMemory(size_bytes // 4096, 4096)
    assert psutil.Process(os.getpid()).memory_info().rss - before < size_bytes // 4
    memory.rows[0] = 1
    assert psutil.Process(os.getpid()).memory_info().rss - before < size_bytes // 4
    memory.close()


def test_pages_are_locked_before_anybody_gets_rows() -> None:
    pinned: list[int] = []

    def pin(memory: memoryview) -> None:
        assert not memory.readonly
        pinned.append(len(memory))

    memory = HostMemory(2, 5000, pin)
    assert pinned == [2 * 8192]
    memory.close()


def test_no_room_in_the_address_space() -> None:
    with pytest.raises(OSError, match="allocate"):
        HostMemory(2**40, 2**20)
