"""Shared memory: who may map it, what must be true for that, and how long it lives."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transfer_rig import SOURCE_LAYOUT, TARGET_LAYOUT, fill_random, is_mapped, open_fds, slices

from baton.errors import TransferError
from baton.layout import KVLayout
from baton.process import ProcessIdentity
from kvtransfer.memory import HEADER_BYTES, AttachedMemory, Share, SharedMemory
from kvtransfer.region import AttachedRegion, HostRegion, attach, pack_layout, unpack_layout


@pytest.fixture
def region() -> Iterator[HostRegion]:
    region = HostRegion.allocate(SOURCE_LAYOUT)
    yield region
    region.close()


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(1000)
    yield memory
    memory.close()


def shared(region: HostRegion) -> bytes:
    descriptor = region.share()
    assert descriptor is not None
    return descriptor


def test_a_region_is_zero_and_has_the_layouts_size(region: HostRegion) -> None:
    assert region.memory.nbytes == SOURCE_LAYOUT.region_bytes
    assert not any(region.memory)


def test_slices_lie_where_the_layout_says(region: HostRegion) -> None:
    fill_random(region, seed=1)
    whole = np.frombuffer(region.memory, np.float32).reshape(SOURCE_LAYOUT.shape)
    assert bytes(region.readable(2, 1, 5, 3)) == whole[2, 1, 5:8].tobytes()
    region.writable(0, 0, 18, 1)[:] = bytes(SOURCE_LAYOUT.slice_bytes)
    assert not whole[0, 0, 18].any()


@pytest.mark.parametrize(
    "place", [(3, 0, 0, 1), (0, 2, 0, 1), (0, 0, 19, 1), (0, 0, 18, 2), (0, 0, 0, 0), (0, 0, -1, 1)]
)
def test_slices_outside_the_region_are_our_own_bug(region: HostRegion, place: tuple[int, int, int, int]) -> None:
    with pytest.raises(AssertionError):
        region.readable(*place)


def test_attached_memory_is_the_same_memory(region: HostRegion) -> None:
    attached = attach(shared(region))
    assert attached.layout == SOURCE_LAYOUT
    attached.writable(1, 0, 7, 1)[:] = b"\7" * SOURCE_LAYOUT.slice_bytes
    assert (slices(region)[1, 0, 7] == 7).all()
    assert slices(region).sum() == 7 * SOURCE_LAYOUT.slice_bytes
    attached.close()


def test_memory_is_not_resident_until_touched() -> None:
    large = KVLayout(layers=8, blocks=4096, block_tokens=32, kv_heads=8, head_dim=128, dtype="bfloat16")
    region = HostRegion.allocate(large)
    assert large.region_bytes == 4 * 2**30
    assert os.fstat(region._shared._fd).st_blocks * 512 <= HEADER_BYTES
    region.close()


def test_what_cannot_be_mapped_is_refused() -> None:
    before = open_fds()
    with pytest.raises(TransferError, match="could not be mapped"):
        SharedMemory(2**62)
    assert open_fds() == before


# ---- lifetime


def test_closing_gives_everything_back() -> None:
    before = open_fds()
    region = HostRegion.allocate(SOURCE_LAYOUT)
    attached = attach(shared(region))
    assert is_mapped()
    attached.close()
    attached.close()
    region.close()
    region.close()
    assert open_fds() == before
    assert not is_mapped()


@pytest.mark.parametrize("library", ["torch", "numpy", "memoryview"])
def test_a_view_outlives_the_region_and_then_frees_it(library: str) -> None:
    region = HostRegion.allocate(SOURCE_LAYOUT)
    view: Any = {
        "torch": lambda: torch.frombuffer(region.memory, dtype=torch.uint8),
        "numpy": lambda: np.frombuffer(region.memory, np.uint8),
        "memoryview": lambda: region.memory[100:200],
    }[library]()
    region.close()
    assert is_mapped()  # first, because writing to what is not mapped would end the whole test run
    view[5] = 9
    assert view[5] == 9
    del view
    assert not is_mapped()


def test_a_closed_region_is_not_used(region: HostRegion) -> None:
    region.close()
    with pytest.raises(AssertionError, match="closed"):
        region.readable(0, 0, 0, 1)
    with pytest.raises(AssertionError, match="closed"):
        region.share()


def test_its_size_is_final(memory: SharedMemory) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(memory.share().fd, 10)


# ---- attaching


def refused(share: Share) -> str:
    before = open_fds()
    with pytest.raises(TransferError) as refusal:
        AttachedMemory.attach(share)
    assert open_fds() == before
    return str(refusal.value)


def test_another_machines_memory_is_refused(memory: SharedMemory) -> None:
    assert "another machine" in refused(replace(memory.share(), boot_id=bytes(16)))


def test_another_containers_memory_is_refused(memory: SharedMemory) -> None:
    assert "PID namespace" in refused(replace(memory.share(), pid_namespace=1))


def test_a_dead_processes_memory_is_refused(memory: SharedMemory) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = ProcessIdentity.of(child.pid)
    assert identity is not None
    child.communicate(b"\n")
    assert "process is gone" in refused(replace(memory.share(), process=identity))


def test_a_recycled_process_id_is_not_mistaken(memory: SharedMemory) -> None:
    own = ProcessIdentity.own()
    recycled = ProcessIdentity(own.pid, own.started_ticks - 1)
    assert "process is gone" in refused(replace(memory.share(), process=recycled))


def test_closed_memory_is_refused(memory: SharedMemory) -> None:
    share = memory.share()
    memory.close()
    assert "no longer has the memory" in refused(share)


def test_a_recycled_descriptor_is_not_mistaken(memory: SharedMemory) -> None:
    other = SharedMemory(1000)
    assert "no longer has the memory" in refused(replace(memory.share(), fd=other.share().fd))
    reading, writing = os.pipe()
    assert "no longer has the memory" in refused(replace(memory.share(), fd=reading))
    os.close(reading)
    os.close(writing)
    other.close()


def test_memory_of_another_size_is_refused(memory: SharedMemory) -> None:
    assert "not what it said" in refused(replace(memory.share(), size=999))


def test_memory_that_could_shrink_under_a_writer_is_refused(memory: SharedMemory) -> None:
    unsealed = os.memfd_create("baton-kv-unsealed", os.MFD_CLOEXEC)
    os.ftruncate(unsealed, HEADER_BYTES + 1000)
    assert "not what it said" in refused(replace(memory.share(), fd=unsealed))
    os.close(unsealed)


def test_what_the_kernel_forbids_is_refused(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "readlink", forbid)
    assert "not permitted" in refused(memory.share())


def test_its_mode_shuts_out_other_users(memory: SharedMemory) -> None:
    assert stat.S_IMODE(os.fstat(memory.share().fd).st_mode) == 0o600


STRANGER = """
import os, sys
from baton.errors import TransferError
from kvtransfer.memory import AttachedMemory, Share

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    AttachedMemory.attach(Share.unpack(bytes.fromhex(sys.stdin.read())))
except TransferError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_process_cannot_map_it(memory: SharedMemory) -> None:
    packed = memory.share().pack().hex()
    command = [sys.executable, "-c", STRANGER]
    told = subprocess.run(command, input=packed, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "not permitted" in told


def test_a_region_whose_size_is_not_its_layouts_is_refused(region: HostRegion) -> None:
    share = shared(region)[: Share.FORMAT.size]
    with pytest.raises(TransferError, match="another size"):
        attach(share + pack_layout(TARGET_LAYOUT))


@given(st.binary(max_size=300))
def test_garbage_is_no_descriptor(data: bytes) -> None:
    with pytest.raises(TransferError):
        attach(data)


@given(st.binary(max_size=100) | st.sampled_from([b"{}", b"[]", b"3", b'{"layers":1}']))
def test_garbage_is_no_layout(data: bytes) -> None:
    with pytest.raises(TransferError):
        unpack_layout(data)


@pytest.mark.parametrize("change", [{"layers": 0}, {"blocks": -1}, {"head_dim": 2.5}, {"dtype": "int3"}, {"dtype": []}])
def test_a_layout_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(TransferError):
        unpack_layout(pack_layout(replace(SOURCE_LAYOUT, **change)))  # type: ignore[arg-type]


def test_descriptions_survive_the_wire(memory: SharedMemory) -> None:
    assert Share.unpack(memory.share().pack()) == memory.share()
    assert unpack_layout(pack_layout(SOURCE_LAYOUT)) == SOURCE_LAYOUT


def test_secrets_stay_out_of_logs(memory: SharedMemory, region: HostRegion) -> None:
    assert memory.share().nonce.hex() not in repr(memory.share())
    assert repr(memory.share().nonce) not in repr(memory.share())
    attached = attach(shared(region))
    assert isinstance(attached, AttachedRegion)
    attached.close()
