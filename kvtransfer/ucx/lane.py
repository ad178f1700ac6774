"""The UCX worker and endpoint of one link, carried forward by the event loop whenever UCX says that there is something.

A worker for each link makes the end of a link certain: closing the lane destroys it at once, and with it whatever was
sent or received. Closing only an endpoint would not do: messages that the peer sends about it afterwards can crash
a worker that lives on (UCX 1.21).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from baton.clock import Clock, monotonic
from baton.errors import TransferError
from kvtransfer.ucx.context import Context

BURST_S = 0.0005
"""Of work between two turns of the loop, give or take a step of UCX's."""
STEPS_MAX = 64
"""Of UCX's, to end what was under way when a lane is closed: a few are enough."""
Done = Callable[[TransferError | None], None]


@dataclass(frozen=True, slots=True)
class _Message:
    request: int
    done: Done
    view: memoryview
    """Keeps the memory."""


class Lane:
    """Belongs to the loop it is made on. Raises TransferError where UCX does."""

    def __init__(self, context: Context, clock: Clock = monotonic) -> None:
        self._loop = asyncio.get_running_loop()
        self._ucx, self._clock = context.ucx, clock
        self._worker: Any = context.make_worker()
        self._endpoint: Any = None
        self._to = 0
        self._handle: int = self._worker.handle
        self._fd: int = self._worker.epoll_file_descriptor
        self._under_way: list[_Message] = []
        self._soon: asyncio.Handle | None = None
        self._loop.add_reader(self._fd, self._advance)
        self._advance_soon()

    @property
    def address(self) -> bytes:
        """What the peer connects to."""
        address: bytes = self._worker.address.tobytes()
        return address

    def connect(self, address: bytes) -> None:
        """The address is from a peer that has proved itself: UCX believes what it says."""
        api = self._ucx.api
        try:
            there = api.UCXAddress.create_from_buffer(address)
            self._endpoint = self._worker.create_endpoint_from_worker_address(there, True)
            self._to = self._endpoint.handle
        except (api.UCXError, RuntimeError, ValueError) as error:
            raise TransferError(f"UCX could not connect to the peer: {error}.") from None
        self._advance_soon()

    def send(self, view: memoryview, tag: int, done: Done) -> None:
        """`done` is called from the loop once the view may change again, never after `close`."""
        assert self._endpoint is not None
        self._begin(self._ucx.send(self._to, _address(view), view.nbytes, tag), done, view)

    def receive(self, view: memoryview, tag: int, done: Done) -> None:
        """`done` is called from the loop once the view is filled, never after `close`."""
        self._begin(self._ucx.receive(self._handle, _address(view), view.nbytes, tag), done, view)

    def _begin(self, request: int, done: Done, view: memoryview) -> None:
        self._under_way.append(_Message(request, done, view))
        self._advance_soon()

    @property
    def is_closed(self) -> bool:
        return self._worker is None

    def close(self) -> None:
        """Idempotent. When it returns no memory is read or written any more; what was under way is never done."""
        if self._worker is None:
            return
        self._loop.remove_reader(self._fd)
        if self._soon is not None:
            self._soon.cancel()
        if self._endpoint is not None:
            self._endpoint.close_blocking()  # by that all that has found its other end is cancelled
        self._finish()
        for message in self._under_way:
            self._ucx.cancel(self._handle, message.request)  # what still waits for the peer
        self._finish()
        self._endpoint = self._worker = None
        self._under_way.clear()

    def _finish(self) -> None:
        """UCX is left with no request and no work of its own: destroyed in the middle of it, it frees memory twice."""
        for _ in range(STEPS_MAX):
            if not self._ucx.progress(self._handle) and not self._under_way:
                return
            self._under_way = [message for message in self._under_way if not self._is_over(message)]

    def _is_over(self, message: _Message) -> bool:
        try:
            return not message.request or self._ucx.is_done(message.request)
        except TransferError:
            return True

    # ---- progress

    def _advance_soon(self) -> None:
        if self._soon is None:
            self._soon = self._loop.call_soon(self._advance)

    def _advance(self) -> None:
        """Does what there is to do, then sleeps until UCX's descriptor says that there is more."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        is_idle = self._burst()
        self._tell_done()
        if self._worker is not None and self._soon is None and not (is_idle and self._worker.arm()):
            self._advance_soon()

    def _burst(self) -> bool:
        until_s = self._clock() + BURST_S
        while self._ucx.progress(self._handle):
            if self._clock() > until_s:
                return False
        return True

    def _tell_done(self) -> None:
        """What it tells may begin more, or close the lane."""
        before, self._under_way = self._under_way, []
        for message in before:
            error = None
            try:
                if message.request and not self._ucx.is_done(message.request):
                    self._under_way.append(message)
                    continue
            except TransferError as failed:
                error = failed
            message.done(error)
            if self._worker is None:
                return


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address
