"""The receiving end of one link: which messages may land, and where."""

import hmac
import secrets
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from baton.clock import Clock
from baton.errors import TransferError
from baton.ids import BlockId
from kvtransfer.control import Fault, layout_digest
from kvtransfer.interface import REPEATS_MAX, Region
from kvtransfer.metrics import TransferMetrics
from kvtransfer.runs import run_blocks_max
from kvtransfer.tcp.proof import NONCE_BYTES, Greeting, Role, ticket_key
from kvtransfer.tickets import SECRET_BYTES, Ticket, TicketBook
from kvtransfer.ucx.wire import (
    COUNT,
    FAULT,
    TRANSPORT,
    TRIAL_BYTES,
    Frame,
    Hello,
    Kind,
    TargetRun,
    Welcome,
    tag_of,
    unpack_runs,
)

POSTED_MAX = 32
"""Messages that wait for their bytes at one time: what a sender has under way."""
FRAMES_MAX = 16
"""Kept while they wait; past it nothing more is read from the connection."""
_NO_SECRET = bytes(SECRET_BYTES)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a peer may keep the receiver waiting, in seconds."""

    hello_s: float = 5.0
    """From the connection's start to its first proof of a ticket."""
    stall_s: float = 30.0
    """Between messages of one frame."""
    idle_s: float = 60.0
    """Between frames while its ticket is closed; with an open one it may be silent as long as that is."""
    linger_s: float = 1.0
    """From a refusal until the connection is cut, so that the peer can read why."""


PATIENCE = Patience()


class Place(Protocol):
    """What messages land by: a Lane."""

    @property
    def address(self) -> bytes: ...

    def receive(self, view: memoryview, tag: int, done: Callable[[TransferError | None], None]) -> None: ...


class _Refused(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.sentence)
        self.fault = fault


@dataclass(slots=True)
class _Batch:
    """The messages of one SLICES frame."""

    messages_left: int
    size_bytes: int
    started_s: float


@dataclass(frozen=True, slots=True)
class _Landing:
    layer: int
    kv: int
    run: TargetRun
    batch: _Batch


class Inlet:
    """Give it frames by `take`; look after each `changed` whether it refused (then close the lane) or `is_full`.

    Whatever comes, it raises nothing. A message's place is given to UCX only while the ticket is open; whoever closes
    a ticket while the inlet `is_landing` under it must close the lane at once: by that nothing lands any more.
    """

    def __init__(
        self,
        region: Region,
        tickets: TicketBook,
        cluster_secret: bytes | None,
        open_lane: Callable[[bytes], Place],
        answer: Callable[[Frame], None],
        changed: Callable[[], None],
        metrics: TransferMetrics,
        clock: Clock,
    ) -> None:
        """`open_lane` makes the way to the peer whose UCX address it is given; it may raise TransferError."""
        self._region, self._tickets, self._cluster_secret = region, tickets, cluster_secret
        self._open_lane, self._answer, self._changed = open_lane, answer, changed
        self._metrics, self._clock = metrics, clock
        self._lane: Place | None = None
        self.ticket: Ticket | None = None
        """That it proved last."""
        self.refusal: Fault | None = None
        """Why nothing more is taken."""
        self.started_s = self.heard_s = clock()
        self._challenge, self._hellos = secrets.token_bytes(NONCE_BYTES), 0
        self._tags, self._number = secrets.randbits(64), 0
        self._frames: deque[Frame] = deque()
        self._waiting: deque[_Landing] = deque()
        self._posted = 0
        answer(Frame(Kind.CHALLENGE, self._challenge))

    @property
    def is_landing(self) -> bool:
        """Whether bytes are on the way into the region."""
        return bool(self._waiting or self._posted)

    @property
    def is_full(self) -> bool:
        return len(self._frames) >= FRAMES_MAX

    def take(self, frame: Frame) -> None:
        self.heard_s = self._clock()
        if self.refusal is None:
            self._frames.append(frame)
            self._proceed()

    def refuse(self, fault: Fault) -> None:
        """Takes no more; idempotent."""
        if self.refusal is None:
            self.refusal = fault
            self._frames.clear()
            self._waiting.clear()
            self._posted = 0
            self._metrics.failed(TRANSPORT, "in")
            self._answer(Frame(Kind.ERROR, FAULT.pack(fault)))
            self._changed()

    def is_overdue(self, patience: Patience) -> bool:
        """Whether the peer has kept the receiver waiting for too long."""
        now_s = self._clock()
        if self.refusal is not None:
            return now_s - self.heard_s > patience.linger_s
        if self.ticket is None:
            return now_s - self.started_s > patience.hello_s
        if self.is_landing:
            return now_s - self.heard_s > patience.stall_s
        return not self.ticket.is_open and now_s - self.heard_s > patience.idle_s

    # ---- frames, in order; what follows a frame waits for its messages

    def _proceed(self) -> None:
        try:
            while self.refusal is None and self._step():
                pass
        except _Refused as refused:
            self.refuse(refused.fault)
        except struct.error:
            self.refuse(Fault.MALFORMED)
        self._changed()

    def _step(self) -> bool:
        """One thing that can be done now; false if there is none."""
        if self._waiting and self._posted < POSTED_MAX:
            self._post(self._waiting.popleft())
            return True
        if self._waiting or not self._frames or (self._posted and self._frames[0].kind != Kind.SLICES):
            return False
        self._do(self._frames.popleft())
        return True

    def _do(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.HELLO:
                self._greet(Hello.unpack(frame.body))
            case Kind.SLICES:
                self._expect(self._open_ticket(), frame.layer, unpack_runs(frame.body))
            case Kind.FENCE:
                self._open_ticket()
                self._answer(Frame(Kind.ACK, COUNT.pack(*COUNT.unpack(frame.body))))
            case _:
                raise _Refused(Fault.MALFORMED)

    def _greet(self, hello: Hello) -> None:
        ticket = self._tickets.find(hello.ticket)
        key = ticket_key(self._cluster_secret, ticket.secret if ticket else _NO_SECRET)
        said = hello.layout_digest + hello.address
        greeting = Greeting(self._challenge, hello.nonce, hello.count, hello.ticket, said)
        if not greeting.is_proven(hello.proof, Role.SENDER, key) or ticket is None or hello.count <= self._hellos:
            raise _Refused(Fault.UNAUTHORIZED)
        if not hmac.compare_digest(hello.layout_digest, layout_digest(self._region.layout)):
            raise _Refused(Fault.LAYOUT)
        if bool(hello.address) != (self._lane is None):
            raise _Refused(Fault.MALFORMED)
        self._hellos, self.ticket = hello.count, ticket
        address = self._connect(hello.address) if hello.address else b""
        welcome = Welcome(hello.count, self._tags, b"", address)
        answered = Greeting(self._challenge, hello.nonce, hello.count, hello.ticket, said + welcome.said)
        proof = answered.proof(Role.RECEIVER, key)
        self._metrics.connected(TRANSPORT, "in")
        self._answer(Frame(Kind.WELCOME, Welcome(hello.count, self._tags, proof, address).pack()))

    def _connect(self, address: bytes) -> bytes:
        """Message 0 shows the sender that the way works before anything is entrusted to it."""
        try:
            self._lane = self._open_lane(address)
            self._receive(memoryview(bytearray(TRIAL_BYTES)), lambda: self._answer(Frame(Kind.ACK, COUNT.pack(0))))
        except TransferError:
            raise _Refused(Fault.UNREACHABLE) from None
        return self._lane.address

    def _open_ticket(self) -> Ticket:
        if self.ticket is None:
            raise _Refused(Fault.UNAUTHORIZED)
        if not self.ticket.is_open:
            raise _Refused(Fault.TICKET_CLOSED)
        return self.ticket

    def _expect(self, ticket: Ticket, layer: int, runs: list[TargetRun]) -> None:
        layout = self._region.layout
        blocks = sum(run.blocks for run in runs)
        is_sound = all(1 <= run.blocks <= run_blocks_max(layout) for run in runs)
        if layer >= layout.layers or not is_sound or not 1 <= blocks <= max(len(ticket.blocks), REPEATS_MAX):
            raise _Refused(Fault.MALFORMED)
        for run in runs:
            if not ticket.blocks.issuperset(map(BlockId, range(run.first, run.first + run.blocks))):
                raise _Refused(Fault.BLOCK_OUTSIDE)
        batch = _Batch(2 * len(runs), 2 * blocks * layout.slice_bytes, self._clock())
        self._waiting.extend(_Landing(layer, kv, run, batch) for kv in (0, 1) for run in runs)

    # ---- messages

    def _post(self, landing: _Landing) -> None:
        self._open_ticket()
        where = landing.layer, landing.kv, landing.run.first, landing.run.blocks
        view = self._region.writable(*where)

        def landed() -> None:
            self._region.written(*where, view)
            landing.batch.messages_left -= 1
            if not landing.batch.messages_left:
                seconds = self._clock() - landing.batch.started_s
                self._metrics.moved(TRANSPORT, "in", landing.batch.size_bytes, seconds)

        try:
            self._receive(view, landed)
        except TransferError:
            raise _Refused(Fault.UNREACHABLE) from None

    def _receive(self, view: memoryview, landed: Callable[[], None]) -> None:
        assert self._lane is not None

        def done(error: TransferError | None) -> None:
            if self.refusal is not None:
                return
            if error is not None:
                self.refuse(Fault.UNREACHABLE)
                return
            self._posted -= 1
            self.heard_s = self._clock()
            landed()
            self._proceed()

        self._lane.receive(view, tag_of(self._tags, self._number), done)
        self._number += 1
        self._posted += 1
