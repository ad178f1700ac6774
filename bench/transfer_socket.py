"""What transports are held against: a plain socket loop and one memcpy, a process an end.

`python -m bench.transfer_socket KIND SLICE_BYTES LAYERS BLOCKS`; KIND is socket (an end of it) or memcpy (both ends).
"""

import asyncio
import socket
import struct
import sys
import threading
import time
from typing import Any

import numpy as np

from bench.transfer_end import Handlers, answer, fill, flat_slices, repeat, tails_checksum
from bench.transfer_plan import Form

ORDER = struct.Struct("!Q")
"""How many bytes come next; one byte is the answer when they are in their place."""
BUFFER_BYTES = 4 * 2**20
"""That the kernel is asked to keep for a socket; it gives what it allows."""


class SocketEnd:
    """Blocking sockets and nothing else: a slice a call, out of and into warm memory of the whole size."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._memory = np.zeros(form.total_bytes, np.uint8).data

    def open(self) -> str:
        self._memory[:] = bytes(len(self._memory))
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        threading.Thread(target=self._take_in, args=(listener,), daemon=True).start()
        return str(listener.getsockname()[1])

    def _take_in(self, listener: socket.socket) -> None:
        with listener, listener.accept()[0] as link:
            while order := link.recv(ORDER.size, socket.MSG_WAITALL):
                place = self._memory[: ORDER.unpack(order)[0]]
                while place:
                    place = place[link.recv_into(place[: self._form.slice_bytes]) :]
                link.sendall(b"!")

    def connect(self, offer: str) -> None:
        fill(self._memory, self._form.slice_bytes)
        self._link = socket.socket()
        self._link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._link.connect(("127.0.0.1", int(offer)))

    async def move(self, layers: int, blocks: int, at_least_s: float, at_least: int) -> dict[str, Any]:
        form = Form(self._form.slice_bytes, layers, blocks)

        async def once() -> None:
            self._link.sendall(ORDER.pack(form.total_bytes))
            for each in flat_slices(self._memory, form):
                self._link.sendall(each)
            self._link.recv(1)

        return await repeat(once, at_least_s, at_least)

    def check(self, layers: int, blocks: int) -> int:
        return tails_checksum(flat_slices(self._memory, Form(self._form.slice_bytes, layers, blocks)))


class Memcpy:
    """One thread, warm pages, the whole in one call."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._source = np.ones(form.total_bytes, np.uint8)
        self._target = np.zeros(form.total_bytes, np.uint8)
        self._target[:] = 2

    async def move(self, layers: int, blocks: int, at_least_s: float, at_least: int) -> dict[str, Any]:
        size = Form(self._form.slice_bytes, layers, blocks).total_bytes

        async def once() -> None:
            np.copyto(self._target[:size], self._source[:size])

        return await repeat(once, at_least_s, at_least)


async def main(kind: str, *sizes: str) -> None:
    form = Form(*map(int, sizes))
    if kind == "memcpy":
        await answer({"move": Memcpy(form).move})
        return
    end = SocketEnd(form)
    handlers: Handlers = {"open": end.open, "connect": end.connect, "move": end.move, "check": end.check}
    await answer({**handlers, "cpu": time.process_time}, (OSError,))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
