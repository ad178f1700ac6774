"""Links between two workers, over real gRPC and real transports."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from link_rig import SECRET, Rig, Side, make_sender, rig
from transfer_rig import TARGET_LAYOUT, StagedRegion

from baton.clock import ManualClock
from baton.errors import BatonError, TransferError, Unauthorized, Unavailable
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2, transfer_pb2_grpc, worker_pb2
from baton.rpc.convert import layout_to_proto
from kvtransfer import registry
from kvtransfer.inproc import InprocHub
from kvtransfer.interface import Offer
from kvtransfer.link import client, conversation, sender, servicer
from kvtransfer.link.client import REFUSED_S, UNREACHABLE_S, Links
from kvtransfer.link.expectation import Expectations
from kvtransfer.link.proof import UnknownLink
from kvtransfer.port import Place, Port, Transport

log = logging.getLogger(__name__)

Handler = Callable[[Any], Awaitable[None]]


def run(test: Callable[[Rig], Any], *sides: Side, **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), rig(*sides, **options) as both:
            await test(both)

    asyncio.run(main())


def ticket_of(link: client.Link) -> worker_pb2.Ticket:
    ticket = worker_pb2.Ticket(request_id="r", prompt=[1, 2])
    link.sign(ticket)
    return ticket


# ---- made


@pytest.mark.parametrize("transport", ["inproc", "shm", "nixl", "ucx", "tcp"])
@pytest.mark.parametrize("secret", [SECRET, None])
def test_a_link_is_made_tested_and_used(transport: str, secret: bytes | None) -> None:
    if (reason := registry.find_transport(transport).missing()) is not None:
        pytest.skip(reason)

    async def test(both: Rig) -> None:
        link = await both.receiver.links.to(both.sender.address)
        assert (link.transport, link.worker_id, link.is_up) == (transport, "prefill-0", True)
        peer = both.sender.book.check(ticket_of(link))
        assert (peer.worker_id, peer.transport) == ("decode-0", transport)
        assert peer.layout == both.receiver.region.layout
        request_id = RequestId("r")
        offer = both.receiver.ports.open(transport, request_id, [BlockId(3)])
        connection = await both.sender.book.connect(peer, request_id, [Offer("other", b""), offer])
        await connection.write(0, [BlockId(0)], [BlockId(3)])
        await connection.fence()
        assert both.receiver.region.readable(0, 0, 3, 1) == both.sender.region.readable(0, 0, 0, 1)
        await connection.close()

    run(test, Side([transport], secret), Side([transport], secret))


def test_the_test_leaves_every_block_but_its_own_alone() -> None:
    async def test(both: Rig) -> None:
        before = bytes(both.receiver.region.readable(0, 0, 0, TARGET_LAYOUT.pool_blocks))
        await both.receiver.links.to(both.sender.address)
        assert bytes(both.receiver.region.readable(0, 0, 0, TARGET_LAYOUT.pool_blocks)) == before
        target = both.receiver.region.readable(2, 1, TARGET_LAYOUT.probe_target, 1)
        assert target == both.sender.region.readable(2, 1, both.sender.region.layout.probe_source, 1)

    run(test)


def test_all_who_ask_get_the_same_link() -> None:
    async def test(both: Rig) -> None:
        links = await asyncio.gather(*(both.receiver.links.to(both.sender.address) for _ in range(8)))
        assert len(set(map(id, links))) == 1 and len(both.sender.book) == 1
        assert await both.receiver.links.to(both.sender.address) is links[0]
        assert both.metric("baton_kv_link_attempts_total", side="receive") == 1

    run(test)


def test_one_that_nobody_waits_for_is_made_once() -> None:
    async def test(both: Rig) -> None:
        links, address = both.receiver.links, both.sender.address
        assert links.present(address) is None
        for _ in range(3):
            links.begin(address)
        assert links.present(address) is None
        link = await links.to(address)
        links.begin(address)
        assert links.present(address) is link
        assert both.metric("baton_kv_link_attempts_total", side="receive") == 1
        link.close()
        assert links.present(address) is None

    run(test)


def test_those_that_nobody_waits_for_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BEGUN_MAX", 1)

    async def test(both: Rig) -> None:
        both.receiver.links.begin(both.sender.address)
        both.receiver.links.begin("127.0.0.1:1")
        assert len(both.receiver.links._making) == 1
        await both.receiver.links.to(both.sender.address)

    run(test)


def test_one_that_nobody_waits_for_may_fail_and_is_not_begun_again_at_once() -> None:
    clock = ManualClock()

    async def test(both: Rig) -> None:
        links, address = both.receiver.links, both.sender.address
        links.begin(address)
        with pytest.raises(TransferError):
            await links.to(address)
        links.begin(address)
        assert not links._making
        clock.advance(REFUSED_S + 1)
        links.begin(address)
        assert links._making
        await links.close()
        links.begin(address)
        assert not links._making

    run(test, Side(fingerprint="other"), clock=clock)


def test_one_that_is_cancelled_does_not_end_it_for_the_others() -> None:
    async def test(both: Rig) -> None:
        first, second = (asyncio.create_task(both.receiver.links.to(both.sender.address)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).is_up and len(both.sender.book) == 1

    run(test)


def test_two_senders_at_once_take_turns_on_the_probe_block() -> None:
    async def test(both: Rig) -> None:
        other = make_sender(Side(), both.hub)
        await other.start()
        try:
            links = await asyncio.gather(*(both.receiver.links.to(s.address) for s in (both.sender, other)))
            assert [link.transport for link in links] == ["shm", "shm"]
        finally:
            await other.stop()
            await other.ports.close()
            other.region.close()

    run(test)


def test_both_sides_learn_how_fast_it_is_and_show_it() -> None:
    async def test(both: Rig) -> None:
        link = await both.receiver.links.to(both.sender.address)
        small_bytes = 2 * TARGET_LAYOUT.slice_bytes
        for worker in (both.sender, both.receiver):
            (small, small_s), (bulk, bulk_s) = worker.measured
            assert small == small_bytes and bulk > small and 0 < small_s < 30 and 0 < bulk_s < 30
        labels = {"transport": "shm", "peer": "prefill-0"}
        assert both.metric("baton_kv_links", transport="shm", speed="expected") == 1
        assert both.metric("baton_kv_link_latency_seconds", **labels) == link.measured.latency_s
        assert both.metric("baton_kv_link_bytes_per_second", **labels) == pytest.approx(link.measured.bytes_per_s)
        there = both.metric("baton_kv_link_latency_seconds", of_sender=True, transport="shm", peer="decode-0")
        assert there == link.measured.latency_s
        both.receiver.links.drop(both.sender.address)
        await both.until(lambda: not len(both.sender.book) and not len(both.receiver.links))
        assert both.metric("baton_kv_link_latency_seconds", **labels) is None
        assert both.metric("baton_kv_links", transport="shm", speed="expected") == 0

    run(test)


# ---- which transport


def test_the_receivers_order_decides() -> None:
    async def test(both: Rig) -> None:
        assert (await both.receiver.links.to(both.sender.address)).transport == "tcp"
        assert both.metric("baton_kv_link_test_failures_total", transport="tcp") is None

    run(test, Side(["shm", "tcp"]), Side(["tcp", "shm"]))


def test_what_does_not_lead_there_gives_way_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    async def test(both: Rig) -> None:
        assert (await both.receiver.links.to(both.sender.address)).transport == "tcp"
        for of_sender in (True, False):
            assert both.metric("baton_kv_link_test_failures_total", of_sender=of_sender, transport="shm") == 1

    with caplog.at_level(logging.INFO):
        run(test, receiver_region=StagedRegion)
    (record,) = [record for record in caplog.records if "not linked by a better transport" in record.message]
    assert record.levelno == logging.INFO and "shm: This worker's KV region cannot be reached" in record.message


class _Broken:
    """A transport that comes up and then fails like a library does: in its own way."""

    transport = "nixl"

    async def start(self) -> None: ...

    async def connect(self, offer: Offer, layout: KVLayout) -> Any:
        del offer, layout
        raise ValueError("library error 7")

    def open(self, request_id: RequestId, blocks: object) -> list[Offer]:
        del request_id, blocks
        return [Offer("nixl", b"")]

    def close_ticket(self, request_id: RequestId) -> None: ...

    async def settle(self, request_id: RequestId) -> None: ...

    async def close(self) -> None: ...


class _Stuck(_Broken):
    async def connect(self, offer: Offer, layout: KVLayout) -> Any:
        del offer, layout
        await asyncio.Event().wait()


class _DoesNotStart(_Broken):
    async def start(self) -> None:
        raise OSError("no such device")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(_Broken, r"failed \(ValueError\)"), (_Stuck, "not done within 1 s"), (_DoesNotStart, r"start \(OSError\)")],
)
def test_a_transport_that_fails_in_its_own_way_is_passed_over_with_a_warning(
    kind: type[_Broken], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def make_port(place: Place) -> Port:
        del place
        return Port(kind(), kind())

    async def test(both: Rig) -> None:
        assert (await both.receiver.links.to(both.sender.address)).transport == "tcp"

    monkeypatch.setitem(registry.BUILT_IN, "nixl", Transport(make_port))
    monkeypatch.setattr(sender, "PROBE_TIMEOUT_S", 1.0)
    with caplog.at_level(logging.WARNING):
        run(test, Side(["nixl", "tcp"]), Side(["nixl", "tcp"]))
    (text,) = (record.message for record in caplog.records if "not linked" in record.message)
    assert re.search(f"not linked by a better transport than tcp: nixl: .*{reason}", text)


def test_bytes_that_arrive_changed_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(both: Rig) -> None:
        monkeypatch.setattr(both.receiver.region, "digests", lambda blocks: [1 for _ in blocks], raising=False)
        with pytest.raises(TransferError, match="What landed in the self-test is not what was sent"):
            await both.receiver.links.to(both.sender.address)
        assert both.metric("baton_kv_link_test_failures_total", transport="shm") == 1
        assert both.metric("baton_kv_link_test_failures_total", transport="tcp") == 1
        assert not len(both.sender.book)

    run(test)


def test_where_one_transport_is_required_its_failure_is_an_error() -> None:
    async def test(both: Rig) -> None:
        with pytest.raises(TransferError, match=r"No KV transport works between prefill-0 and decode-0\. shm: This"):
            await both.receiver.links.to(both.sender.address)

    run(test, Side(), Side(["shm"]), receiver_region=StagedRegion)


def test_without_a_transport_in_common_there_is_no_link() -> None:
    async def test(both: Rig) -> None:
        with pytest.raises(TransferError, match=r"allowed and installed on both ends .*: shm here, tcp there"):
            await both.receiver.links.to(both.sender.address)

    run(test, Side(["shm"]), Side(["tcp"]))


# ---- how fast it should be


SLOW = {"expectations": Expectations(memory=lambda: 1e18)}


@pytest.mark.parametrize(
    ("sends", "receives", "transport", "is_slow"),
    [
        (SLOW, {}, "shm", False),  # blocks this small are judged by what one write costs
        ({"expectations": Expectations(1e15)}, {}, "tcp", True),
        ({}, {"bytes_per_s_min": 1e15}, "tcp", True),
        ({"expectations": Expectations(1e15)}, {"bytes_per_s_min": 1.0}, "shm", False),
    ],
)
def test_a_slow_link_is_called_slow(
    sends: dict[str, Any],
    receives: dict[str, Any],
    transport: str,
    is_slow: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(both: Rig) -> None:
        await both.receiver.links.to(both.sender.address)
        speed = "slow" if is_slow else "expected"
        assert both.metric("baton_kv_links", transport=transport, speed=speed) == 1

    with caplog.at_level(logging.WARNING):
        run(test, Side([transport], options=sends), Side([transport], options=receives))
    assert ("slower than it should be" in caplog.text) == is_slow


# ---- refused


@pytest.mark.parametrize(("sends", "receives"), [(SECRET, b"another" * 5), (SECRET, None), (None, SECRET)])
def test_without_the_same_secret_there_is_no_link(sends: bytes | None, receives: bytes | None) -> None:
    async def test(both: Rig) -> None:
        with pytest.raises(Unauthorized, match="secret"):
            await both.receiver.links.to(both.sender.address)
        assert not len(both.sender.book) and not len(both.receiver.links)
        assert both.metric("baton_kv_link_failures_total", reason="unauthorized") == 1

    run(test, Side(secret=sends), Side(secret=receives))


@pytest.mark.parametrize(
    ("side", "sentence"),
    [
        (Side(fingerprint="other"), "Model, weights or dtype"),
        (Side(options={"makes_digests": False}), "makes no digests"),
    ],
)
def test_one_whose_blocks_are_of_no_use_refuses_in_a_sentence(side: Side, sentence: str) -> None:
    async def test(both: Rig) -> None:
        with pytest.raises(TransferError, match=sentence):
            await both.receiver.links.to(both.sender.address)

    run(test, side)


def test_another_layout_is_refused() -> None:
    async def test(both: Rig) -> None:
        with pytest.raises(TransferError, match="layouts of sender and receiver differ: kv_heads 2 and 4"):
            await both.receiver.links.to(both.sender.address)

    run(test, layout=KVLayout(layers=3, blocks=32, block_tokens=4, kv_heads=4, head_dim=8, dtype="float32"))


@pytest.mark.parametrize("transport", ["inproc", "shm", "ucx", "tcp"])
@pytest.mark.parametrize("block_tokens", [3, 8])
def test_blocks_of_another_size_are_tried_as_far_as_the_senders_reaches(transport: str, block_tokens: int) -> None:
    if (reason := registry.find_transport(transport).missing()) is not None:
        pytest.skip(reason)

    async def test(both: Rig) -> None:
        link = await both.receiver.links.to(both.sender.address)
        assert both.sender.book.check(ticket_of(link)).layout == both.receiver.region.layout
        own, other = both.sender.region, both.receiver.region
        sent = bytes(own.readable(2, 1, own.layout.probe_source, 1))
        landed = bytes(other.readable(2, 1, other.layout.probe_target, 1))
        assert landed == sent[: len(landed)].ljust(len(landed), b"\0")

    run(test, Side([transport]), Side([transport]), layout=replace(TARGET_LAYOUT, block_tokens=block_tokens))


def test_nixl_is_left_out_between_blocks_of_unlike_sizes(caplog: pytest.LogCaptureFixture) -> None:
    async def test(both: Rig) -> None:
        assert (await both.receiver.links.to(both.sender.address)).transport == "tcp"
        assert "nixl is not tried for the link to decode-0: It moves KV blocks as they lie" in caplog.text
        assert both.metric("baton_kv_link_attempts_total", side="receive") == 1

    async def without_tcp(both: Rig) -> None:
        with pytest.raises(TransferError, match=r"No KV transport works between .* nixl: It moves KV blocks as they"):
            await both.receiver.links.to(both.sender.address)

    if (reason := registry.find_transport("nixl").missing()) is not None:
        pytest.skip(reason)
    caplog.set_level(logging.INFO)
    unlike = replace(TARGET_LAYOUT, block_tokens=8)
    run(test, Side(["nixl", "tcp"]), Side(["nixl", "tcp"]), layout=unlike)
    run(without_tcp, Side(["nixl"]), Side(["nixl"]), layout=unlike)


def test_a_refusal_is_remembered_for_a_while() -> None:
    clock = ManualClock()

    async def test(both: Rig) -> None:
        for seconds, attempts in ((0, 1), (REFUSED_S - 0.1, 1), (0.2, 2)):
            clock.advance(seconds)
            with pytest.raises(TransferError, match="Model, weights or dtype"):
                await both.receiver.links.to(both.sender.address)
            assert both.metric("baton_kv_link_attempts_total", side="receive") == attempts

    run(test, Side(fingerprint="other"), clock=clock)


def test_that_a_worker_cannot_be_reached_is_remembered_for_less() -> None:
    clock = ManualClock()

    async def test(both: Rig) -> None:
        await both.sender.stop()
        for seconds, attempts in ((0, 1), (UNREACHABLE_S / 2, 1), (UNREACHABLE_S, 2)):
            clock.advance(seconds)
            with pytest.raises(Unavailable, match="cannot be linked with"):
                await both.receiver.links.to(both.sender.address)
            assert both.metric("baton_kv_link_failures_total", reason="unreachable") == attempts

    run(test, clock=clock)


# ---- tickets


def test_a_ticket_is_good_once_and_on_its_link_alone() -> None:
    async def test(both: Rig) -> None:
        link = await both.receiver.links.to(both.sender.address)
        first, second = ticket_of(link), ticket_of(link)
        both.sender.book.check(second)
        both.sender.book.check(first)
        with pytest.raises(Unauthorized, match="used before"):
            both.sender.book.check(first)
        forged = ticket_of(link)
        forged.prompt.append(3)
        with pytest.raises(Unauthorized, match="not signed"):
            both.sender.book.check(forged)
        forged.link.link_id = bytes(16)
        with pytest.raises(UnknownLink):
            both.sender.book.check(forged)
        with pytest.raises(UnknownLink):
            both.sender.book.check(worker_pb2.Ticket())

    run(test)


def test_a_ticket_is_served_by_its_links_transport_alone() -> None:
    async def test(both: Rig) -> None:
        link = await both.receiver.links.to(both.sender.address)
        peer = both.sender.book.check(ticket_of(link))
        await both.receiver.ports.start("tcp")
        offer = both.receiver.ports.open("tcp", RequestId("r"), [BlockId(1)])
        with pytest.raises(TransferError):
            await both.sender.book.connect(peer, RequestId("r"), [offer])

    run(test)


# ---- the end


def test_a_broken_link_is_made_anew() -> None:
    clock = ManualClock()

    async def test(both: Rig) -> None:
        first = await both.receiver.links.to(both.sender.address)
        ticket = ticket_of(first)
        port = int(both.sender.address.split(":")[1])
        await both.sender.stop()
        await both.until(lambda: not first.is_up and not len(both.sender.book))
        with pytest.raises(Unavailable):
            await both.receiver.links.to(both.sender.address)
        await both.sender.start(port)
        second = await made_at_last(both, clock)
        assert second is not first and len(both.sender.book) == len(both.receiver.links) == 1
        with pytest.raises(UnknownLink):
            both.sender.book.check(ticket)

    run(test, clock=clock)


async def made_at_last(both: Rig, clock: ManualClock) -> client.Link:
    while True:
        clock.advance(UNREACHABLE_S)
        try:
            return await both.receiver.links.to(both.sender.address)
        except Unavailable:
            await asyncio.sleep(0.05)  # gRPC dials again when it likes


def test_a_dropped_link_is_made_anew_and_a_newer_one_is_not_dropped() -> None:
    async def test(both: Rig) -> None:
        first = await both.receiver.links.to(both.sender.address)
        both.receiver.links.drop(both.sender.address, first)
        assert not first.is_up
        second = await both.receiver.links.to(both.sender.address)
        both.receiver.links.drop(both.sender.address, first)
        both.receiver.links.drop("127.0.0.1:1")
        assert second.is_up and await both.receiver.links.to(both.sender.address) is second
        await both.until(lambda: len(both.sender.book) == 1)

    run(test)


def test_an_idle_link_is_closed() -> None:
    async def test(both: Rig) -> None:
        link = await both.receiver.links.to(both.sender.address)
        await both.until(lambda: not link.is_up and not len(both.sender.book) and not len(both.receiver.links))

    run(test, Side(), Side(options={"idle_s": 0.05}))


def test_of_too_many_links_the_one_used_longest_ago_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LINKS_MAX", 1)

    async def test(both: Rig) -> None:
        other = make_sender(Side(), both.hub)
        await other.start()
        try:
            first = await both.receiver.links.to(both.sender.address)
            second = await both.receiver.links.to(other.address)
            assert second.is_up and not first.is_up
            await both.until(lambda: not len(both.sender.book))
        finally:
            await other.stop()
            await other.ports.close()
            other.region.close()

    run(test)


def test_closing_ends_what_is_being_made() -> None:
    async def test(both: Rig) -> None:
        asking = asyncio.create_task(both.receiver.links.to(both.sender.address))
        await asyncio.sleep(0.001)
        await both.receiver.links.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await asking
        with pytest.raises(Unavailable, match="shutting down"):
            await both.receiver.links.to(both.sender.address)
        await both.until(lambda: not len(both.sender.book))

    run(test)


def test_a_channel_that_is_closed_beneath_it_is_a_worker_that_cannot_be_reached() -> None:
    async def test(both: Rig) -> None:
        asking = asyncio.create_task(both.receiver.links.to(both.sender.address))
        while not both.sender.book._handshakes:  # noqa: ASYNC110 - seen in whichever turn of the loop it begins
            await asyncio.sleep(0)
        await both.channels.close()
        with pytest.raises(Unavailable):
            await asking

    run(test)


# ---- strangers, and peers that fall silent


async def serving(handler: Handler, links: Callable[[str], Any]) -> None:
    """A sender that is not as it should be."""

    class Servicer(transfer_pb2_grpc.TransferServicer):
        async def Link(self, request_iterator: object, context: Any) -> None:  # noqa: N802 - gRPC's name
            del request_iterator
            await handler(context)

    server = grpc.aio.server()
    transfer_pb2_grpc.add_TransferServicer_to_server(Servicer(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        await links(address)
    finally:
        await server.stop(0)
        await asyncio.sleep(0)


async def _silent(context: Any) -> None:
    await context.read()
    await asyncio.Event().wait()


async def _ends(context: Any) -> None:
    await context.read()


async def _talks_nonsense(context: Any) -> None:
    await context.read()
    await context.write(transfer_pb2.LinkResponse(ready=transfer_pb2.LinkReady(transport="shm")))


async def _challenges_without_a_nonce(context: Any) -> None:
    await context.read()
    await context.write(transfer_pb2.LinkResponse(challenge=transfer_pb2.LinkChallenge(worker_id="p")))
    await context.read()


@pytest.mark.parametrize(
    ("handler", "error", "sentence"),
    [
        (_silent, Unavailable, "silent for 0.05 s"),
        (_ends, Unavailable, "before it was ready|cannot be linked with"),
        (_talks_nonsense, TransferError, "does not keep to the link protocol"),
        (_challenges_without_a_nonce, TransferError, "does not keep to the link protocol"),
    ],
)
def test_a_sender_that_is_none_costs_one_attempt(
    handler: Any, error: type[BatonError], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if handler is _silent:
        _steps_within(0.05, monkeypatch)

    async def test(both: Rig) -> None:
        async def ask(address: str) -> None:
            with pytest.raises(error, match=sentence):
                await both.receiver.links.to(address)

        await serving(handler, ask)
        monkeypatch.undo()
        assert (await both.receiver.links.to(both.sender.address)).is_up

    run(test)


def _steps_within(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    hear = conversation.Conversation.hear

    async def hear_soon(self: Any, *kinds: str, within_s: float = 0.0) -> Any:
        del within_s
        return await hear(self, *kinds, within_s=seconds)

    monkeypatch.setattr(conversation.Conversation, "hear", hear_soon)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], grpc.StatusCode.DEADLINE_EXCEEDED),
        ([transfer_pb2.LinkRequest()], grpc.StatusCode.INVALID_ARGUMENT),
        ([transfer_pb2.LinkRequest(answer=transfer_pb2.LinkAnswer())], grpc.StatusCode.INVALID_ARGUMENT),
        (
            [transfer_pb2.LinkRequest(hello=transfer_pb2.LinkHello(version=1, worker_id="x", nonce=b"n"))],
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        ([transfer_pb2.LinkRequest(hello=transfer_pb2.LinkHello(version=9))], grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
def test_a_stranger_costs_one_call(
    messages: list[transfer_pb2.LinkRequest], code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not messages:
        _steps_within(0.05, monkeypatch)

    async def test(both: Rig) -> None:
        call = transfer_pb2_grpc.TransferStub(await both.channels.to(both.sender.address)).Link()
        for message in messages:
            await call.write(message)
        assert await call.code() is code
        assert not len(both.sender.book) and not both.sender.book._handshakes
        monkeypatch.undo()
        assert (await both.receiver.links.to(both.sender.address)).is_up

    run(test)


def test_a_receiver_that_stalls_after_its_proof_costs_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "LINK_TIMEOUT_S", 1.0)

    async def test(both: Rig) -> None:
        call = transfer_pb2_grpc.TransferStub(await both.channels.to(both.sender.address)).Link()
        for message in (HELLO, ANSWER):
            await call.write(message)
        responses = [await call.read(), await call.read()]
        assert [response.WhichOneof("message") for response in responses] == ["challenge", "try"]
        with pytest.raises(grpc.aio.AioRpcError, match="not made within"):
            await call.read()
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not len(both.sender.book) and not both.sender.book._handshakes

    run(test, Side(["inproc"], None))


def _messages() -> st.SearchStrategy[transfer_pb2.LinkRequest]:
    """What a stranger may send, the beginning of a handshake among it."""
    layout = st.sampled_from([None, layout_to_proto(TARGET_LAYOUT)])
    hello = st.builds(
        transfer_pb2.LinkHello,
        version=st.integers(0, 2),
        worker_id=st.text(max_size=4),
        nonce=st.sampled_from([b"", b"n" * 32]),
        fingerprint=st.sampled_from(["f", "g"]),
        layout=layout,
        transports=st.lists(st.sampled_from(["inproc", "tcp", "shm", "\n"]), max_size=3),
    )
    offer = st.builds(
        transfer_pb2.TransportOffer,
        transport=st.sampled_from(["inproc", "tcp"]),
        descriptor=st.binary(max_size=40),
    )
    probe = st.builds(transfer_pb2.LinkProbe, offer=offer) | st.builds(transfer_pb2.LinkProbe, failure=st.text())
    answer = st.builds(transfer_pb2.LinkAnswer, proof=st.sampled_from([b"", b"p" * 32]))
    verified = st.builds(transfer_pb2.LinkVerified, failure=st.text(max_size=4))
    kinds = {"hello": hello, "answer": answer, "probe": probe, "verified": verified}
    return st.one_of(*(st.builds(transfer_pb2.LinkRequest, **{name: kind}) for name, kind in kinds.items()))


class _Aborted(Exception):
    pass


class _StrangersCall:
    """A ServicerContext that a stranger has sent all his messages to."""

    def __init__(self, messages: list[transfer_pb2.LinkRequest]) -> None:
        self._messages = iter(messages)

    async def read(self) -> object:
        return next(self._messages, grpc.aio.EOF)

    async def write(self, message: transfer_pb2.LinkResponse) -> None:
        assert message.WhichOneof("message") != "ready"

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        assert code is not grpc.StatusCode.INTERNAL and details.isprintable()
        raise _Aborted


HELLO = transfer_pb2.LinkRequest(
    hello=transfer_pb2.LinkHello(
        version=1,
        worker_id="x",
        nonce=b"n" * 32,
        fingerprint="f",
        layout=layout_to_proto(TARGET_LAYOUT),
        transports=["inproc"],
    )
)
ANSWER = transfer_pb2.LinkRequest(answer=transfer_pb2.LinkAnswer())


@settings(max_examples=60, deadline=None)
@given(st.lists(_messages(), max_size=4), st.sampled_from([[], [HELLO], [HELLO, ANSWER]]), st.booleans())
def test_whatever_a_stranger_says_ends_in_a_refusal(
    messages: list[transfer_pb2.LinkRequest], before: list[transfer_pb2.LinkRequest], is_open: bool
) -> None:
    async def main() -> None:
        sender = make_sender(Side(["inproc"], None if is_open else SECRET), InprocHub())
        with pytest.raises(_Aborted):
            await sender.book.serve(_StrangersCall([*before, *messages]))  # type: ignore[arg-type]
        assert not len(sender.book) and not sender.book._handshakes
        await sender.ports.close()
        sender.region.close()

    asyncio.run(main())


def test_handshakes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "HANDSHAKES_MAX", 1)

    async def test(both: Rig) -> None:
        stub = transfer_pb2_grpc.TransferStub(await both.channels.to(both.sender.address))
        first = stub.Link()
        await first.write(transfer_pb2.LinkRequest())
        await first.code()
        silent = stub.Link()
        await both.until(lambda: both.sender.book._handshakes == 1)
        with pytest.raises(Unavailable, match="as many links as it can"):
            await both.receiver.links.to(both.sender.address)
        silent.cancel()
        await both.until(lambda: both.sender.book._handshakes == 0)

    run(test)


def test_no_error_or_log_tells_the_secret_or_a_key(caplog: pytest.LogCaptureFixture) -> None:
    async def test(both: Rig) -> None:
        link = await both.receiver.links.to(both.sender.address)
        ticket = ticket_of(link)
        log.info("%r %r %r", link, both.sender.book, both.sender.book.check(ticket))

    with caplog.at_level(logging.DEBUG):
        run(test)
    assert SECRET.decode() not in caplog.text and SECRET.hex() not in caplog.text


def test_links_closed_twice_are_closed() -> None:
    async def test(both: Rig) -> None:
        links: Links = both.receiver.links
        await links.to(both.sender.address)
        await links.close()
        await links.close()
        assert not len(links)

    run(test)
