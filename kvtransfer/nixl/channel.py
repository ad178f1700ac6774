"""One end of a control connection: frames in, frames out."""

import asyncio
import hmac
from contextlib import suppress
from dataclasses import dataclass

from baton.errors import TransferError
from kvtransfer.control import Fault
from kvtransfer.nixl.proof import SEAL_BYTES, Greeting, Role, Sealer
from kvtransfer.nixl.wire import BODY_BYTES_MAX, Header, Kind


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    body: bytes = b""
    layer: int = 0
    count: int = 0


class Lost(TransferError):
    """The other end closed the connection, or it broke."""


class Malformed(TransferError):
    """What came is no frame, or its seal is wrong."""


class Channel:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._out: Sealer | None = None
        self._in: Sealer | None = None

    def seal(self, greeting: Greeting, role: Role) -> None:
        """From here on frames have seals; `role` is this end's."""
        other = Role.SENDER if role is Role.RECEIVER else Role.RECEIVER
        self._out, self._in = greeting.sealer(role), greeting.sealer(other)

    def send(self, kind: Kind, body: bytes = b"", layer: int = 0, count: int = 0) -> None:
        """Little enough never to wait: how much may be sent before an answer is bounded."""
        assert len(body) <= BODY_BYTES_MAX
        frame = Header(kind, len(body), layer, count).pack() + body
        is_sealed = self._out is not None and kind != Kind.ERROR
        self._writer.write(frame + self._out.seal(frame) if is_sealed and self._out else frame)

    def refuse(self, fault: Fault) -> None:
        """The last that is sent."""
        if not self._writer.is_closing():
            self.send(Kind.ERROR, count=fault)
            self.end()

    def end(self) -> None:
        """Nothing more is sent, which tells the other end to do the same."""
        if not self._writer.is_closing():
            with suppress(OSError):  # the other end is gone
                self._writer.write_eof()

    async def receive(self) -> Frame:
        """Raises Lost or Malformed."""
        try:
            head = await self._reader.readexactly(Header.FORMAT.size)
            header = Header.unpack(head)
            if header is None:
                raise Malformed("What the other end sent is no frame of this version.")
            body = await self._reader.readexactly(header.body_bytes)
            await self._check_seal(header.kind, head + body)
        except (asyncio.IncompleteReadError, OSError):
            raise Lost("The other end closed the connection.") from None
        return Frame(header.kind, body, header.layer, header.count)

    async def _check_seal(self, kind: int, frame: bytes) -> None:
        if self._in is None or kind == Kind.ERROR:
            return
        seal = await self._reader.readexactly(SEAL_BYTES)
        if not hmac.compare_digest(seal, self._in.seal(frame)):
            raise Malformed("A frame was changed on its way.")

    async def until_end(self) -> None:
        """Until the other end sends nothing more; what it still sends is dropped."""
        with suppress(OSError):
            while await self._reader.read(BODY_BYTES_MAX):
                pass

    def cut(self) -> None:
        """Idempotent; wakes whoever receives."""
        self._writer.transport.abort()

    async def closed(self) -> None:
        """Cuts it, and returns when its socket is closed."""
        self.cut()
        with suppress(OSError):
            await self._writer.wait_closed()
