"""The receiving machine without a socket: what lands, what is refused, and when its patience ends."""

import random
import struct
from collections.abc import Iterator
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from transfer_rig import REQUEST, SOURCE_LAYOUT, StagedRegion, ids, is_mapped, slices

from baton.clock import ManualClock
from baton.ids import RequestId
from baton.layout import KVLayout
from kvtransfer.control import Address, Fault, layout_digest
from kvtransfer.metrics import TransferMetrics
from kvtransfer.region import HostRegion
from kvtransfer.tcp.inlet import LAND_VIEWS_MAX, Inlet
from kvtransfer.tcp.patience import Patience
from kvtransfer.tcp.proof import Greeting, Role, ticket_key
from kvtransfer.tcp.wire import Header, Hello, Kind
from kvtransfer.tickets import Ticket, TicketBook

LAYOUT = SOURCE_LAYOUT
CHALLENGE, NONCE = bytes(range(16)), bytes(range(16, 32))
SECRET = b"the cluster's secret, which is long"
OTHER_LAYOUT = KVLayout(layers=3, blocks=20, block_tokens=4, kv_heads=2, head_dim=8, dtype="float32")


class Bench:
    """One inlet over a region, with a ticket on blocks 3, 4, 5 and 9."""

    def __init__(self, kind: type[HostRegion] = HostRegion) -> None:
        self.region, self.tickets, self.clock = kind.allocate(LAYOUT), TicketBook(), ManualClock()
        self.answers: list[Header] = []
        self.bodies: list[bytes] = []
        self.ticket = self.tickets.open(REQUEST, ids(3, 4, 5, 9))
        self.inlet = Inlet(
            self.region,
            self.tickets,
            memoryview(bytearray(64)),
            self._answer,
            TransferMetrics(CollectorRegistry()),
            self.clock,
            Patience(hello_s=5, stall_s=30, idle_s=60, linger_s=1),
            CHALLENGE,
            SECRET,
        )

    def _answer(self, data: bytes) -> None:
        header = Header.unpack(data[: Header.FORMAT.size])
        assert header is not None
        self.answers.append(header)
        self.bodies.append(data[Header.FORMAT.size :])

    def feed(self, data: bytes, pieces: list[int] | None = None) -> None:
        """As a socket would: at most what the buffers take at a time, or at most a piece."""
        rest, sizes = memoryview(data), cycle(pieces or [len(data) + 1])
        while rest:
            buffers = self.inlet.buffers()
            assert all(map(len, buffers))
            assert 1 <= len(buffers) <= LAND_VIEWS_MAX
            piece = rest[: next(sizes)]
            size = 0
            for buffer in buffers:
                part = piece[size : size + len(buffer)]
                buffer[: len(part)] = part
                size += len(part)
            rest = rest[size:]
            self.inlet.filled(size)

    @property
    def faults(self) -> list[Fault]:
        return [Fault(answer.count) for answer in self.answers if answer.kind == Kind.ERROR]

    def is_untouched(self) -> bool:
        return not any(self.region.memory)


@pytest.fixture(params=[HostRegion, StagedRegion])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.inlet.close()
    bench.region.close()


def greeting(ticket: Ticket, count: int = 1, layout: KVLayout = LAYOUT) -> Greeting:
    return Greeting(CHALLENGE, NONCE, count, ticket.number, layout_digest(layout))


def flipped_at_the_end(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def hello(
    ticket: Ticket,
    count: int = 1,
    secret: bytes | None = None,
    layout: KVLayout = LAYOUT,
    cluster: bytes | None = SECRET,
) -> bytes:
    proof = greeting(ticket, count, layout).proof(Role.SENDER, ticket_key(cluster, secret or ticket.secret))
    return Header(Kind.HELLO, ticket.number, count=count).pack() + Hello(NONCE, layout_digest(layout), proof).pack()


def slices_frame(ticket: Ticket, layer: int, target: tuple[int, ...], payload: bytes) -> bytes:
    head = Header(Kind.SLICES, ticket.number, layer, len(target)).pack()
    return head + struct.pack(f"!{len(target)}I", *target) + payload


def payload_of(blocks: int) -> bytes:
    return random.Random(blocks).randbytes(2 * blocks * LAYOUT.slice_bytes)


def fence(ticket: Ticket, count: int = 2) -> bytes:
    return Header(Kind.FENCE, ticket.number, count=count).pack()


@settings(deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=20))
def test_slices_land_however_the_bytes_are_cut(pieces: list[int]) -> None:
    bench, payload = Bench(), payload_of(3)
    bench.feed(hello(bench.ticket) + slices_frame(bench.ticket, 1, (9, 3, 4), payload) + fence(bench.ticket), pieces)
    expected = np.zeros_like(slices(bench.region))
    expected[1, :, [9, 3, 4]] = np.frombuffer(payload, np.uint8).reshape(2, 3, LAYOUT.slice_bytes).transpose(1, 0, 2)
    assert (slices(bench.region) == expected).all()
    assert [(answer.kind, answer.count) for answer in bench.answers] == [
        (Kind.CHALLENGE, 0),
        (Kind.WELCOME, 1),
        (Kind.ACK, 2),
    ]
    bench.inlet.close()
    bench.region.close()


@pytest.mark.parametrize("landed", [0, 1, 300, LAYOUT.slice_bytes, 3 * LAYOUT.slice_bytes + 1])
def test_what_comes_after_the_ticket_closed_does_not_land(bench: Bench, landed: int) -> None:
    frame = slices_frame(bench.ticket, 0, (3, 4), b"\xee" * len(payload_of(2)))
    head = len(frame) - len(payload_of(2))
    bench.feed(hello(bench.ticket) + frame[: head + landed])
    bench.tickets.close(REQUEST)
    before = bytes(bench.region.memory)
    bench.feed(frame[head + landed :])
    assert bytes(bench.region.memory) == before
    assert bench.faults == [Fault.TICKET_CLOSED]
    bench.feed(fence(bench.ticket))
    assert bench.faults == [Fault.TICKET_CLOSED] * 2
    assert bench.inlet.refusal is None


def test_after_a_closed_ticket_the_connection_serves_another(bench: Bench) -> None:
    bench.feed(hello(bench.ticket))
    bench.tickets.close(REQUEST)
    bench.feed(slices_frame(bench.ticket, 0, (3,), payload_of(1)))
    later = bench.tickets.open(RequestId("req-2"), ids(7))
    bench.feed(hello(later, 2) + slices_frame(later, 0, (7,), payload_of(1)) + fence(later))
    assert bytes(bench.region.readable(0, 0, 7, 1)) == payload_of(1)[: LAYOUT.slice_bytes]
    assert bench.answers[-1].kind == Kind.ACK


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        (lambda t: b"BKV0" + Header(Kind.FENCE, t.number).pack()[4:], Fault.MALFORMED),
        (lambda t: Header(0, t.number).pack(), Fault.MALFORMED),
        (lambda t: Header(99, t.number).pack(), Fault.MALFORMED),
        (lambda t: Header(Kind.ACK, t.number).pack(), Fault.MALFORMED),
        (lambda t: Header(Kind.SLICES, t.number, 3, 1).pack(), Fault.MALFORMED),
        (lambda t: Header(Kind.SLICES, t.number, 0, 0).pack(), Fault.MALFORMED),
        (lambda t: Header(Kind.SLICES, t.number, 0, 65).pack(), Fault.MALFORMED),
        (lambda t: Header(Kind.SLICES, t.number, 0, 2**32 - 1).pack(), Fault.MALFORMED),
        (lambda t: Header(Kind.SLICES, t.number + 1, 0, 1).pack(), Fault.UNAUTHORIZED),
        (lambda t: Header(Kind.FENCE, t.number + 1).pack(), Fault.UNAUTHORIZED),
        (lambda t: slices_frame(t, 0, (3, 6), b""), Fault.BLOCK_OUTSIDE),
        (lambda t: slices_frame(t, 0, (2**32 - 1,), b""), Fault.BLOCK_OUTSIDE),
        (lambda t: hello(t, 2, secret=bytes(16)), Fault.UNAUTHORIZED),
        (lambda t: hello(t, 2, cluster=b"another cluster's"), Fault.UNAUTHORIZED),
        (lambda t: hello(t, 2, cluster=None), Fault.UNAUTHORIZED),
        (lambda t: flipped_at_the_end(hello(t, 2)), Fault.UNAUTHORIZED),
        (lambda t: hello(t, 1), Fault.UNAUTHORIZED),
        (lambda t: hello(t, 0), Fault.UNAUTHORIZED),
        (lambda t: hello(t, 2, layout=OTHER_LAYOUT), Fault.LAYOUT),
    ],
)
def test_what_is_wrong_is_refused_once_and_for_all(bench: Bench, frame: object, fault: Fault) -> None:
    assert callable(frame)
    bench.feed(hello(bench.ticket) + frame(bench.ticket))
    assert bench.inlet.refusal is fault
    assert bench.faults == [fault]
    bench.feed(slices_frame(bench.ticket, 0, (3,), payload_of(1)))
    assert bench.is_untouched()
    assert bench.faults == [fault]


@pytest.mark.parametrize("frame", [slices_frame, fence], ids=["slices", "fence"])
def test_without_a_proof_nothing_is_taken(bench: Bench, frame: object) -> None:
    is_fence = frame is fence
    bench.feed(fence(bench.ticket) if is_fence else slices_frame(bench.ticket, 0, (3,), payload_of(1)))
    assert bench.inlet.refusal is Fault.UNAUTHORIZED
    assert bench.is_untouched()


def test_a_ticket_that_never_was_has_no_secret(bench: Bench) -> None:
    never = Ticket(99, frozenset(ids(3)), bytes(16))
    bench.feed(hello(never))
    assert bench.inlet.refusal is Fault.UNAUTHORIZED


def test_the_receiver_challenges_and_proves_itself(bench: Bench) -> None:
    assert bench.answers == [Header(Kind.CHALLENGE, 0)]
    assert bench.bodies == [CHALLENGE]
    bench.feed(hello(bench.ticket, 7))
    assert bench.answers[1:] == [Header(Kind.WELCOME, bench.ticket.number, count=7)]
    key = ticket_key(SECRET, bench.ticket.secret)
    assert bench.bodies[1] == greeting(bench.ticket, 7).proof(Role.RECEIVER, key)


def test_a_hello_of_another_connection_is_good_for_nothing(bench: Bench) -> None:
    said = Greeting(bytes(16), NONCE, 1, bench.ticket.number, layout_digest(LAYOUT))
    proof = said.proof(Role.SENDER, ticket_key(SECRET, bench.ticket.secret))
    body = Hello(NONCE, layout_digest(LAYOUT), proof).pack()
    bench.feed(Header(Kind.HELLO, bench.ticket.number, count=1).pack() + body)
    assert bench.inlet.refusal is Fault.UNAUTHORIZED


def test_the_receivers_own_proof_sent_back_is_none(bench: Bench) -> None:
    proof = greeting(bench.ticket).proof(Role.RECEIVER, ticket_key(SECRET, bench.ticket.secret))
    body = Hello(NONCE, layout_digest(LAYOUT), proof).pack()
    bench.feed(Header(Kind.HELLO, bench.ticket.number, count=1).pack() + body)
    assert bench.inlet.refusal is Fault.UNAUTHORIZED


frames = st.builds(
    lambda kind, ticket, layer, count: Header(kind, ticket, layer, count).pack(),
    st.integers(0, 8),
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(0, 6),
)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60) | frames, max_size=12), st.booleans(), st.lists(st.integers(1, 64), min_size=1))
def test_garbage_changes_nothing_and_breaks_nothing(
    garbage: list[bytes], is_authenticated: bool, pieces: list[int]
) -> None:
    bench = Bench()
    if is_authenticated:
        bench.feed(hello(bench.ticket))
    bench.feed(b"".join(garbage), pieces)
    outside = [block for block in range(LAYOUT.blocks) if block not in (3, 4, 5, 9)]
    assert not slices(bench.region)[:, :, outside].any()
    assert is_authenticated or bench.is_untouched()
    assert len(bench.faults) <= 1
    bench.inlet.close()
    bench.region.close()


@settings(deadline=None)
@given(st.data())
def test_a_valid_stream_with_a_few_bytes_changed_lands_within_its_ticket(data: st.DataObject) -> None:
    bench = Bench()
    stream = bytearray(
        hello(bench.ticket)
        + slices_frame(bench.ticket, 1, (9, 3), payload_of(2))
        + fence(bench.ticket)
        + slices_frame(bench.ticket, 2, (4, 5), payload_of(2))
    )
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(stream) - 1), st.integers(1, 255)), min_size=1, max_size=4)
    ):
        stream[position] ^= value
    bench.feed(bytes(stream), data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=8)))
    outside = [block for block in range(LAYOUT.blocks) if block not in (3, 4, 5, 9)]
    assert not slices(bench.region)[:, :, outside].any()
    assert len(bench.faults) <= 1
    bench.inlet.close()
    bench.region.close()


# ---- patience


def overdue_after(bench: Bench, seconds: float) -> bool:
    bench.clock.advance(seconds)
    return bench.inlet.is_overdue()


def test_a_connection_must_prove_a_ticket_soon_even_if_it_keeps_talking(bench: Bench) -> None:
    for byte in hello(bench.ticket)[:5]:
        assert not overdue_after(bench, 1)
        bench.feed(bytes([byte]))
    assert overdue_after(bench, 0.1)


def test_with_an_open_ticket_it_may_be_silent(bench: Bench) -> None:
    bench.feed(hello(bench.ticket))
    assert not overdue_after(bench, 10_000)


def test_within_a_frame_it_may_not(bench: Bench) -> None:
    bench.feed(hello(bench.ticket) + fence(bench.ticket)[:1])
    assert not overdue_after(bench, 30)
    assert overdue_after(bench, 0.1)
    bench.feed(fence(bench.ticket)[1:] + slices_frame(bench.ticket, 0, (3,), payload_of(1))[:-1])
    assert not overdue_after(bench, 30)
    assert overdue_after(bench, 0.1)


def test_with_a_closed_ticket_it_is_kept_for_the_next_only_so_long(bench: Bench) -> None:
    bench.feed(hello(bench.ticket))
    bench.tickets.close(REQUEST)
    assert not overdue_after(bench, 60)
    assert overdue_after(bench, 0.1)


def test_after_a_refusal_there_is_time_to_read_it_and_no_more(bench: Bench) -> None:
    bench.feed(b"x" * Header.FORMAT.size)
    assert not overdue_after(bench, 1)
    bench.feed(b"x" * 100)
    assert overdue_after(bench, 0.1)


# ---- what it holds


def test_a_closed_inlet_holds_no_region() -> None:
    bench = Bench()
    bench.feed(hello(bench.ticket) + slices_frame(bench.ticket, 0, (3,), payload_of(1))[:-1])
    bench.inlet.close()
    bench.region.close()
    assert not is_mapped()


def test_secrets_stay_out_of_logs() -> None:
    ticket = Ticket(1, frozenset(), b"0123456789abcdef")
    address = Address("host", 1, 1, b"0123456789abcdef")
    assert "0123" not in f"{ticket} {address} {ticket!r} {address!r}"
    assert Address.unpack(address.pack()) == address
