"""A control connection's bytes as frames, at either end."""

import asyncio
from typing import Protocol, cast

from baton.errors import TransferError
from kvtransfer.ucx.wire import Frame


class Owner(Protocol):
    """Whose connection it is. Nothing is called after `on_lost`, which comes once."""

    def on_connected(self, channel: "Channel") -> None: ...

    def on_frame(self, frame: Frame) -> None: ...

    def on_lost(self) -> None:
        """The peer is gone, closed, or sent what is no frame; or this side closed."""


class Channel(asyncio.Protocol):
    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._unread = bytearray()
        self._is_paused = False

    def send(self, frame: Frame) -> None:
        """Nothing, once the connection is lost."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame.pack())

    def pause(self) -> None:
        """No more frames until `resume`; at most one read's worth of them is kept."""
        if self._transport is not None and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
            self._read()

    def close(self) -> None:
        """After what has been sent has left."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---- for the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not of that class
        self._owner.on_connected(self)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        self._read()

    def _read(self) -> None:
        try:
            while not self._is_paused and (frame := Frame.read(self._unread)) is not None:
                self._owner.on_frame(frame)
        except TransferError:
            self._unread.clear()
            self.abort()

    def pause_writing(self) -> None:
        """Control frames are few and small: a peer that lets them pile up does not read."""
        self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        del error  # what it means is the same
        self._transport = None
        self._owner.on_lost()
