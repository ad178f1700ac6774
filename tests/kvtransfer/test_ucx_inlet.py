"""What a link's receiving end makes of frames and messages: whatever comes, only what a ticket covers lands."""

import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from transfer_rig import REQUEST, TARGET_LAYOUT, ids, slices

from baton.clock import ManualClock
from baton.errors import TransferError
from kvtransfer.control import Address, Fault, layout_digest
from kvtransfer.interface import REPEATS_MAX
from kvtransfer.metrics import TransferMetrics
from kvtransfer.region import HostRegion
from kvtransfer.tcp.proof import Greeting, Role, ticket_key
from kvtransfer.tickets import Ticket, TicketBook
from kvtransfer.ucx.inlet import FRAMES_MAX, POSTED_MAX, Inlet, Patience
from kvtransfer.ucx.wire import (
    BODY_BYTES_MAX,
    COUNT,
    FAULT,
    Frame,
    Hello,
    Kind,
    TargetRun,
    Welcome,
    pack_runs,
    tag_of,
    unpack_runs,
)

SECRET = b"the cluster's own secret"
PATIENCE = Patience(hello_s=5, stall_s=30, idle_s=60, linger_s=1)


@dataclass
class Message:
    view: memoryview
    tag: int
    done: Callable[[TransferError | None], None]

    def land(self, value: int) -> None:
        self.view[:] = bytes([value]) * self.view.nbytes
        self.done(None)


@dataclass
class FakeLane:
    peer: bytes
    address: bytes = b"receiver's UCX address"
    messages: list[Message] = field(default_factory=list)

    def receive(self, view: memoryview, tag: int, done: Callable[[TransferError | None], None]) -> None:
        self.messages.append(Message(view, tag, done))


class Rig:
    """An inlet with a sender's hand at its frames, and a hand at UCX."""

    def __init__(self, secret: bytes | None = SECRET) -> None:
        self.region = HostRegion.allocate(TARGET_LAYOUT)
        self.tickets, self.clock, self.changes = TicketBook(), ManualClock(), 0
        self.answers: list[Frame] = []
        self.lanes: list[FakeLane] = []
        self.registry = CollectorRegistry()
        ways = self._open_lane, self.answers.append, self._changed
        self.inlet = Inlet(self.region, self.tickets, secret, *ways, TransferMetrics(self.registry), self.clock)
        (challenge,) = self.answers
        assert challenge.kind == Kind.CHALLENGE
        self.challenge = challenge.body
        self.hellos = 0

    def _open_lane(self, address: bytes) -> FakeLane:
        self.lanes.append(FakeLane(address))
        return self.lanes[-1]

    def _changed(self) -> None:
        self.changes += 1

    @property
    def messages(self) -> list[Message]:
        return self.lanes[-1].messages

    @property
    def fault(self) -> Fault | None:
        last = self.answers[-1]
        return Fault(*FAULT.unpack(last.body)) if last.kind == Kind.ERROR else None

    def hello(
        self, ticket: Ticket, secret: bytes | None = SECRET, address: bytes = b"", role: Role = Role.SENDER
    ) -> Frame:
        self.hellos += 1
        nonce, digest = secrets.token_bytes(16), layout_digest(TARGET_LAYOUT)
        greeting = Greeting(self.challenge, nonce, self.hellos, ticket.number, digest + address)
        proof = greeting.proof(role, ticket_key(secret, ticket.secret))
        return Frame(Kind.HELLO, Hello(self.hellos, ticket.number, nonce, digest, proof, address).pack())

    def greet(self, *blocks: int) -> Ticket:
        """A ticket on the blocks, proven, and message 0 landed."""
        ticket = self.tickets.open(REQUEST, ids(*blocks))
        is_first = not self.lanes
        self.inlet.take(self.hello(ticket, address=b"sender's UCX address" if is_first else b""))
        assert self.fault is None
        if is_first:
            self.messages.pop().done(None)
            assert (self.answers[-1].kind, self.answers[-1].body) == (Kind.ACK, COUNT.pack(0))
        return ticket

    def expect(self, *runs: tuple[int, int], layer: int = 0) -> None:
        self.inlet.take(Frame(Kind.SLICES, pack_runs([TargetRun(*run) for run in runs]), layer))

    def fence(self, count: int = 1) -> None:
        self.inlet.take(Frame(Kind.FENCE, COUNT.pack(count)))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_messages_land_where_the_frame_said(rig: Rig) -> None:
    rig.greet(3, 4, 9)
    rig.expect((3, 2), (9, 1), layer=1)
    tags = [message.tag for message in rig.messages]
    assert tags == [tag_of(tags[0] - 1, number) for number in range(1, 5)]
    for value, message in enumerate(tuple(rig.messages), 1):
        message.land(value)
    expected = slices(rig.region).copy() * 0
    expected[1, 0, 3:5], expected[1, 0, 9], expected[1, 1, 3:5], expected[1, 1, 9] = 1, 2, 3, 4
    assert (slices(rig.region) == expected).all()


def test_a_fence_is_answered_once_all_before_it_has_landed(rig: Rig) -> None:
    rig.greet(1, 2)
    rig.expect((1, 2))
    rig.fence(7)
    rig.messages[0].land(1)
    assert rig.answers[-1].kind != Kind.ACK or rig.answers[-1].body == COUNT.pack(0)
    rig.messages[1].land(1)
    assert rig.answers[-1] == Frame(Kind.ACK, COUNT.pack(7))


def test_the_receiver_proves_itself_too(rig: Rig) -> None:
    ticket = rig.tickets.open(REQUEST, ids(1))
    hello = rig.hello(ticket, address=b"sender")
    rig.inlet.take(hello)
    welcome, said = Welcome.unpack(rig.answers[-1].body), Hello.unpack(hello.body)
    transcript = said.layout_digest + said.address + welcome.said
    greeting = Greeting(rig.challenge, said.nonce, said.count, ticket.number, transcript)
    assert greeting.is_proven(welcome.proof, Role.RECEIVER, ticket_key(SECRET, ticket.secret))
    assert rig.lanes[0].peer == b"sender" and welcome.address == rig.lanes[0].address


@pytest.mark.parametrize("secret", [None, b"another"])
def test_without_the_cluster_secret_a_ticket_is_worth_nothing(rig: Rig, secret: bytes | None) -> None:
    ticket = rig.tickets.open(REQUEST, ids(1))
    rig.inlet.take(rig.hello(ticket, secret=secret, address=b"sender"))
    assert rig.fault == Fault.UNAUTHORIZED and not rig.lanes


def test_without_the_tickets_secret_the_clusters_is_worth_nothing(rig: Rig) -> None:
    ticket = rig.tickets.open(REQUEST, ids(1))
    forged = Ticket(ticket.number, ticket.blocks, bytes(16))
    rig.inlet.take(rig.hello(forged, address=b"sender"))
    assert rig.fault == Fault.UNAUTHORIZED and not rig.lanes


def test_a_proof_cannot_be_sent_twice_nor_back(rig: Rig) -> None:
    ticket = rig.tickets.open(REQUEST, ids(1))
    hello = rig.hello(ticket, address=b"sender")
    rig.inlet.take(hello)
    rig.messages[0].done(None)
    rig.inlet.take(hello)
    assert rig.fault == Fault.UNAUTHORIZED
    other = Rig()
    other.inlet.take(other.hello(other.tickets.open(REQUEST, ids(1)), address=b"sender", role=Role.RECEIVER))
    assert other.fault == Fault.UNAUTHORIZED


def test_another_idea_of_the_layout_is_refused(rig: Rig) -> None:
    ticket = rig.tickets.open(REQUEST, ids(1))
    nonce, digest = bytes(16), bytes(16)
    greeting = Greeting(rig.challenge, nonce, 1, ticket.number, digest)
    proof = greeting.proof(Role.SENDER, ticket_key(SECRET, ticket.secret))
    rig.inlet.take(Frame(Kind.HELLO, Hello(1, ticket.number, nonce, digest, proof).pack()))
    assert rig.fault == Fault.LAYOUT


@pytest.mark.parametrize("frame", [Frame(Kind.SLICES, pack_runs([TargetRun(1, 1)])), Frame(Kind.FENCE, COUNT.pack(1))])
def test_nothing_goes_before_a_hello(rig: Rig, frame: Frame) -> None:
    rig.tickets.open(REQUEST, ids(1))
    rig.inlet.take(frame)
    assert rig.fault == Fault.UNAUTHORIZED


@pytest.mark.parametrize(
    ("runs", "fault"),
    [
        ([(1, 2)], Fault.BLOCK_OUTSIDE),
        ([(1, 1), (5, 1)], Fault.BLOCK_OUTSIDE),
        ([(2**32 - 1, 1)], Fault.BLOCK_OUTSIDE),
        ([(1, 0)], Fault.MALFORMED),
        ([(1, 2**32 - 1)], Fault.MALFORMED),
        ([(1, 1)] * (REPEATS_MAX + 1), Fault.MALFORMED),
        ([], Fault.MALFORMED),
    ],
)
def test_runs_that_the_ticket_does_not_cover_are_refused(rig: Rig, runs: list[tuple[int, int]], fault: Fault) -> None:
    rig.greet(1, 3, 4)
    rig.expect(*runs)
    assert rig.fault == fault and not rig.messages


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.SLICES, b"\0" * 7),
        Frame(Kind.SLICES, pack_runs([TargetRun(1, 1)]), layer=3),
        Frame(Kind.FENCE, b""),
        Frame(Kind.HELLO, b"\0" * 10),
        Frame(Kind.ACK, COUNT.pack(0)),
        Frame(99),
    ],
)
def test_what_is_no_frame_of_a_sender_is_refused(rig: Rig, frame: Frame) -> None:
    rig.greet(1)
    rig.inlet.take(frame)
    assert rig.fault == Fault.MALFORMED


def test_after_its_ticket_is_closed_nothing_is_posted(rig: Rig) -> None:
    rig.greet(1, 2)
    rig.tickets.close(REQUEST)
    assert not rig.inlet.is_landing
    rig.expect((1, 1))
    assert rig.fault == Fault.TICKET_CLOSED and not rig.messages


def test_a_refusal_drops_what_still_lands(rig: Rig) -> None:
    rig.greet(*range(30))
    rig.expect(*((block, 1) for block in range(30)))
    assert len(rig.messages) == POSTED_MAX
    rig.tickets.close(REQUEST)
    rig.inlet.refuse(Fault.TICKET_CLOSED)
    assert bool(rig.inlet.is_landing) is False
    changes, posted = rig.changes, len(rig.messages)
    rig.messages[0].done(None)
    rig.inlet.take(Frame(Kind.FENCE, COUNT.pack(1)))
    assert (rig.changes, len(rig.messages), rig.fault) == (changes, posted, Fault.TICKET_CLOSED)


def test_places_and_frames_are_bounded(rig: Rig) -> None:
    rig.greet(*range(32))
    most = 0
    for _ in range(FRAMES_MAX + 2):
        rig.expect(*((block, 1) for block in range(32)))
        most = max(most, len(rig.messages))
    assert most == POSTED_MAX and rig.inlet.is_full
    landed = 0
    while landed < len(rig.messages):
        rig.messages[landed].land(1)
        landed += 1
        assert len(rig.messages) - landed <= POSTED_MAX
    assert landed == (FRAMES_MAX + 2) * 64 and not rig.inlet.is_full


def test_the_next_ticket_waits_for_the_last_messages(rig: Rig) -> None:
    rig.greet(1)
    rig.expect((1, 1))
    ticket = rig.tickets.open(REQUEST, ids(2))  # which closes the first
    rig.inlet.take(rig.hello(ticket))
    assert rig.inlet.ticket is not ticket
    for message in tuple(rig.messages):
        message.done(None)
    assert rig.inlet.ticket is ticket


def test_a_message_that_ucx_could_not_move_ends_the_link(rig: Rig) -> None:
    rig.greet(1)
    rig.expect((1, 1))
    rig.messages[0].done(TransferError("Gone."))
    assert rig.fault == Fault.UNREACHABLE and not rig.inlet.is_landing


def test_who_keeps_the_receiver_waiting_is_overdue(rig: Rig) -> None:
    def overdue_after(seconds: float) -> bool:
        assert not rig.inlet.is_overdue(PATIENCE)
        rig.clock.advance(seconds - 0.1)
        assert not rig.inlet.is_overdue(PATIENCE)
        rig.clock.advance(0.2)
        return rig.inlet.is_overdue(PATIENCE)

    assert overdue_after(PATIENCE.hello_s)
    rig.greet(1)
    rig.clock.advance(1000)
    assert not rig.inlet.is_overdue(PATIENCE)  # an open ticket may be silent
    rig.expect((1, 1))
    assert overdue_after(PATIENCE.stall_s)
    for message in tuple(rig.messages):
        message.done(None)
    rig.tickets.close(REQUEST)
    assert overdue_after(PATIENCE.idle_s)
    rig.inlet.take(Frame(99))
    assert rig.fault == Fault.MALFORMED
    assert overdue_after(PATIENCE.linger_s)


BODIES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6).map(
        lambda runs: pack_runs([TargetRun(*run) for run in runs])
    ),
)
FRAMES = st.builds(Frame, st.integers(0, 9), BODIES, st.integers(0, 4))


@settings(max_examples=200, deadline=None)
@given(frames=st.lists(FRAMES, max_size=12), proven=st.booleans(), landing=st.lists(st.booleans(), max_size=20))
def test_whatever_comes_only_the_tickets_blocks_change(frames: list[Frame], proven: bool, landing: list[bool]) -> None:
    rig = Rig()
    if proven:
        rig.greet(5, 6, 7)
    landings = iter(landing)
    for frame in frames:
        rig.inlet.take(frame)
        waiting: list[Message] = rig.lanes[-1].messages if rig.lanes else []
        while waiting and any(islice(landings, 1)):
            waiting.pop(0).land(0xEE)
    others = [block for block in range(TARGET_LAYOUT.blocks) if block not in (5, 6, 7)]
    assert not slices(rig.region)[:, :, others].any()
    assert proven or not rig.lanes
    rig.region.close()


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(1, 50), max_size=8))
def test_frames_are_read_alike_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    def read(pieces: list[bytes]) -> tuple[list[Frame], bool]:
        unread, frames = bytearray(), []
        try:
            for piece in pieces:
                unread += piece
                while (frame := Frame.read(unread)) is not None:
                    frames.append(frame)
        except TransferError:
            return frames, False
        return frames, True

    whole = Frame(Kind.SLICES, data[:40], 1).pack() + Frame(Kind.FENCE, COUNT.pack(3)).pack() + data
    pieces, rest = [], whole
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    frames, is_sound = read([whole])
    assert read([*pieces, rest]) == (frames, is_sound)
    assert frames[:2] == [Frame(Kind.SLICES, data[:40], 1), Frame(Kind.FENCE, COUNT.pack(3))]


def test_a_frame_longer_than_any_is_refused_before_it_is_read() -> None:
    header = bytearray(Frame(Kind.SLICES).pack())
    header[-4:] = struct.pack("!I", BODY_BYTES_MAX + 1)
    with pytest.raises(TransferError):
        Frame.read(header)


@given(runs=st.lists(st.builds(TargetRun, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=20))
def test_runs_survive_packing(runs: list[TargetRun]) -> None:
    assert unpack_runs(pack_runs(runs)) == runs


@given(data=st.binary(max_size=60))
def test_a_descriptor_is_read_or_refused(data: bytes) -> None:
    try:
        address = Address.unpack(data)
    except TransferError:
        return
    assert address.pack() == data


def test_secrets_are_not_shown() -> None:
    secret = b"sixteen secret b"
    assert "secret" not in repr(Address("host", 1, 2, secret)).replace("secret=", "")
    assert repr(Hello(1, 2, b"", b"", secret)).count("sixteen") == 0
