"""The peer's side of bench.transfer, run by the peer's own interpreter: NIXL as it comes, without anything of Baton's.

One end a process: `python -m bench.transfer_peer MEMORY SLICE_BYTES LAYERS BLOCKS`, where MEMORY is `shared`, of the
kind that a worker's region is in, or `private`, which the system may put into huge pages: UCX reads these much faster.
It does what NIXL's examples and its users do: registers the memory once, prepares the lists of both sides' slices once,
makes a request of their indices for each transfer, posts it and asks for its state until it is done. Written against
nixl-cu12 1.5.1.
"""

import asyncio
import mmap
import os
import sys
import time
from typing import Any

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config

from bench.transfer_end import Handlers, answer, fill, flat_slices, repeat, tails_checksum
from bench.transfer_plan import Form

MEMORY = "DRAM"


class NixlEnd:
    """Its slices lie one after the other."""

    def __init__(self, form: Form, memory: str) -> None:
        self._form = form
        self._array = allocated(form.total_bytes, memory)
        self._memory = self._array.data
        self._agent: Any = nixl_agent(f"bench-{os.getpid()}", nixl_agent_config(enable_prog_thread=True))
        self._registered = self._agent.register_memory([(self._address, form.total_bytes, 0, "")], MEMORY)

    @property
    def _address(self) -> int:
        return int(self._array.ctypes.data)

    def open(self) -> str:
        self._memory[:] = bytes(len(self._memory))
        return f"{self._address}:{self._agent.get_agent_metadata().hex()}"

    def connect(self, offer: str) -> None:
        fill(self._memory, self._form.slice_bytes)
        address, metadata = offer.split(":")
        name = self._agent.add_remote_agent(bytes.fromhex(metadata))
        self._ours = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", self._slices(self._address), MEMORY)
        self._theirs = self._agent.prep_xfer_dlist(name, self._slices(int(address)), MEMORY)

    def _slices(self, address: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        size = self._form.slice_bytes
        return np.array([(address + i * size, size, 0) for i in range(self._form.slices)], np.uint64)

    async def move(
        self, layers: int, blocks: int, at_least_s: float, at_least: int, operation: str = "WRITE"
    ) -> dict[str, Any]:
        indices = np.arange(Form(self._form.slice_bytes, layers, blocks).slices, dtype=np.int32)
        agent = self._agent

        async def once() -> None:
            request = agent.make_prepped_xfer(operation, self._ours, indices, self._theirs, indices)
            state = agent.transfer(request)
            while state == "PROC":
                state = agent.check_xfer_state(request)
            assert state == "DONE", state
            agent.release_xfer_handle(request)

        return await repeat(once, at_least_s, at_least)

    def check(self, layers: int, blocks: int) -> int:
        return tails_checksum(flat_slices(self._memory, Form(self._form.slice_bytes, layers, blocks)))


def allocated(size_bytes: int, memory: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if memory == "private":
        return np.zeros(size_bytes, np.uint8)
    descriptor = os.memfd_create("bench")
    os.ftruncate(descriptor, size_bytes)
    return np.frombuffer(mmap.mmap(descriptor, size_bytes), np.uint8)


async def main(memory: str, *form: str) -> None:
    end = NixlEnd(Form(*map(int, form)), memory)
    handlers: Handlers = {"open": end.open, "connect": end.connect, "move": end.move, "check": end.check}
    await answer({**handlers, "cpu": time.process_time})


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
