"""The receiving end of one connection, as a machine without I/O: it says which memory the next bytes belong in."""

import struct
from collections.abc import Callable, Generator, Iterator, Sequence

from baton.clock import Clock
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.control import Fault, layout_digest
from kvtransfer.interface import REPEATS_MAX, Region
from kvtransfer.metrics import TransferMetrics
from kvtransfer.runs import RUN_BYTES_MAX, Run, run_blocks_max, runs_of
from kvtransfer.tcp.patience import Patience
from kvtransfer.tcp.proof import Greeting, Role, ticket_key
from kvtransfer.tcp.wire import TRANSPORT, Header, Hello, Kind
from kvtransfer.tickets import SECRET_BYTES, Ticket, TicketBook

LAND_VIEWS_MAX = 128
"""Received by one system call; of scattered blocks as of adjacent ones, RUN_BYTES_MAX at most."""
_NO_SECRET = bytes(SECRET_BYTES)
"""Of tickets that there are not: they take as long to refuse as those with another secret."""


class _Refused(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.sentence)
        self.fault = fault


class Inlet:
    """Ask `buffers`, fill them from the socket, say how much to `filled`; never keep one for later.

    It begins with a challenge. Slices are filled straight into the region. The moment a ticket is closed its
    bytes go to scratch instead, though the frame had begun. Whatever comes, it raises nothing and holds one frame's
    ids at most.
    """

    def __init__(
        self,
        region: Region,
        tickets: TicketBook,
        scratch: memoryview,
        answer: Callable[[bytes], None],
        metrics: TransferMetrics,
        clock: Clock,
        patience: Patience,
        challenge: bytes,
        cluster_secret: bytes | None,
    ) -> None:
        self._region, self._tickets, self._scratch = region, tickets, scratch
        self._answer, self._metrics, self._clock, self._patience = answer, metrics, clock, patience
        self._started_s = self._heard_s = clock()
        self._challenge, self._cluster_secret = challenge, cluster_secret
        self._hello_count = 0
        self._ticket: Ticket | None = None
        self._awaits_header = True
        self.refusal: Fault | None = None
        """Why nothing more is taken from this connection."""
        self._frames = self._read_frames()
        self._places, self._lands_under = next(self._frames)
        answer(Header(Kind.CHALLENGE, 0).pack() + challenge)

    @property
    def is_authenticated(self) -> bool:
        return self._ticket is not None

    @property
    def has_failed(self) -> bool:
        """Whether the connection was good for nothing, or is no more."""
        return self._ticket is None or self.refusal is not None

    def buffers(self) -> list[memoryview]:
        """Where the next bytes go, one after the other; none is empty, and they are LAND_VIEWS_MAX at most."""
        if self.refusal is not None:
            return [self._scratch]
        if self._lands_under is None or self._lands_under.is_open:
            return self._places
        return [self._scratch[: sum(map(len, self._places))]]

    def filled(self, size_bytes: int) -> None:
        if self.refusal is not None:
            return
        self._heard_s = self._clock()
        full = 0
        for place in self._places:
            if size_bytes < len(place):
                break
            size_bytes -= len(place)
            full += 1
        del self._places[:full]
        if self._places:
            self._places[0] = self._places[0][size_bytes:]
            return
        try:
            self._places, self._lands_under = next(self._frames)
        except _Refused as refused:
            self._refuse(refused.fault)

    def close(self) -> None:
        """Lets go of its view of the region; nothing may follow."""
        self._places, self._lands_under = [self._scratch], None
        self._frames.close()

    def is_overdue(self) -> bool:
        """Whether the peer has kept the receiver waiting for too long."""
        now_s, patience = self._clock(), self._patience
        if self.refusal is not None:
            return now_s - self._heard_s > patience.linger_s
        if self._ticket is None:
            return now_s - self._started_s > patience.hello_s
        if not self._is_between_frames:
            return now_s - self._heard_s > patience.stall_s
        return not self._ticket.is_open and now_s - self._heard_s > patience.idle_s

    @property
    def _is_between_frames(self) -> bool:
        return self._awaits_header and len(self._places[0]) == Header.FORMAT.size

    def _refuse(self, fault: Fault) -> None:
        self.refusal = fault
        self._answer(Header(Kind.ERROR, 0, count=fault).pack())

    # Each yield is memory to fill, in order, with the ticket under which it lands; it resumes when that is full.

    def _read_frames(self) -> "Generator[_Wanted, None, None]":
        head = memoryview(bytearray(Header.FORMAT.size))
        while True:
            self._awaits_header = True
            yield [head], None
            self._awaits_header = False
            header = Header.unpack(head)
            match header:
                case Header(kind=Kind.HELLO):
                    yield from self._read_hello(header)
                case Header(kind=Kind.SLICES):
                    yield from self._read_slices(header, self._ticket_of(header))
                case Header(kind=Kind.FENCE):
                    self._fence(header, self._ticket_of(header))
                case _:
                    raise _Refused(Fault.MALFORMED)

    def _ticket_of(self, header: Header) -> Ticket:
        if self._ticket is None or self._ticket.number != header.ticket:
            raise _Refused(Fault.UNAUTHORIZED)
        return self._ticket

    def _read_hello(self, header: Header) -> "Generator[_Wanted, None, None]":
        body = memoryview(bytearray(Hello.FORMAT.size))
        yield [body], None
        hello = Hello.unpack(body)
        ticket = self._tickets.find(header.ticket)
        key = ticket_key(self._cluster_secret, ticket.secret if ticket else _NO_SECRET)
        greeting = Greeting(self._challenge, hello.nonce, header.count, header.ticket, hello.layout_digest)
        is_proven = greeting.is_proven(hello.proof, Role.SENDER, key)
        if ticket is None or not is_proven or header.count <= self._hello_count:
            raise _Refused(Fault.UNAUTHORIZED)
        if hello.layout_digest != layout_digest(self._region.layout):
            raise _Refused(Fault.LAYOUT)
        self._ticket, self._hello_count = ticket, header.count
        self._metrics.connected(TRANSPORT, "in")
        welcome = Header(Kind.WELCOME, ticket.number, count=header.count).pack()
        self._answer(welcome + greeting.proof(Role.RECEIVER, key))

    def _read_slices(self, header: Header, ticket: Ticket) -> "Generator[_Wanted, None, None]":
        started_s = self._clock()
        layout = self._region.layout
        if header.layer >= layout.layers or not 1 <= header.count <= max(len(ticket.blocks), REPEATS_MAX):
            raise _Refused(Fault.MALFORMED)
        ids = memoryview(bytearray(4 * header.count))
        yield [ids], None
        target = tuple(map(BlockId, struct.unpack(f"!{header.count}I", ids)))
        if not ticket.blocks.issuperset(target):
            raise _Refused(Fault.BLOCK_OUTSIDE)
        for batch in _batches(target, layout):
            yield from self._land(ticket, header.layer, batch)
        if ticket.is_open:
            size_bytes = 2 * header.count * layout.slice_bytes
            self._metrics.moved(TRANSPORT, "in", size_bytes, self._clock() - started_s)
        else:
            self._tell_closed(ticket)

    def _land(self, ticket: Ticket, layer: int, batch: "Sequence[_Piece]") -> "Generator[_Wanted, None, None]":
        places = [self._region.writable(layer, kv, run.target, run.blocks) for kv, run in batch]
        yield list(places), ticket
        if ticket.is_open:
            for (kv, run), place in zip(batch, places, strict=True):
                self._region.written(layer, kv, run.target, run.blocks, place)

    def _fence(self, header: Header, ticket: Ticket) -> None:
        if ticket.is_open:
            self._answer(Header(Kind.ACK, ticket.number, count=header.count).pack())
        else:
            self._tell_closed(ticket)

    def _tell_closed(self, ticket: Ticket) -> None:
        self._answer(Header(Kind.ERROR, ticket.number, count=Fault.TICKET_CLOSED).pack())


_Wanted = tuple[list[memoryview], Ticket | None]
_Piece = tuple[int, Run]
"""Keys (0) or values (1) of adjacent blocks."""


def _batches(target: Sequence[BlockId], layout: KVLayout) -> Iterator[list[_Piece]]:
    """All keys, then all values, in pieces that are received together."""
    batch: list[_Piece] = []
    room = RUN_BYTES_MAX
    for kv in (0, 1):
        for run in runs_of(target, target, run_blocks_max(layout)):
            size_bytes = run.blocks * layout.slice_bytes
            if batch and (size_bytes > room or len(batch) == LAND_VIEWS_MAX):
                yield batch
                batch, room = [], RUN_BYTES_MAX
            batch.append((kv, run))
            room -= size_bytes
    yield batch
