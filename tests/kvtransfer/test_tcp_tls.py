"""The tcp transport over TLS: who is let in, how fast it may be pushed, and what a stranger gets."""

import asyncio
import os
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tcp_rig import (
    LAYOUT,
    LOOPS,
    SECRET,
    Run,
    check_serves,
    impostor,
    open_sockets,
    place,
    raw,
    read_to_the_end,
    receiving,
    region_of,
    runner,
    sending,
)
from tls_certificates import (
    OURS_AUTHORITY,
    OURS_KEY_ENCRYPTED,
    THEIRS_AUTHORITY,
    THEIRS_CERTIFICATE,
    THEIRS_KEY,
    their_files,
    tls_files,
)
from transfer_rig import REQUEST, fill_random, ids, slices

from baton.errors import TransferError
from baton.layout import KVLayout
from kvtransfer.control import Address
from kvtransfer.interface import Connection, Offer
from kvtransfer.region import HostRegion
from kvtransfer.tcp import receiver as receiver_module
from kvtransfer.tcp.patience import Patience
from kvtransfer.tcp.receiver import TcpReceiver
from kvtransfer.tcp.tls_inflow import TlsInflow
from kvtransfer.tcp.tls_stream import PIECE_BYTES, TlsStream
from kvtransfer.tls import TlsContexts, TlsFiles

MIB = KVLayout(layers=2, blocks=16, block_tokens=256, kv_heads=8, head_dim=128, dtype="float32")


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    return runner(request.param)


@pytest.fixture
def ours(tmp_path: Path) -> TlsFiles:
    return tls_files(tmp_path / "ours")


def test_slices_land_as_they_were_sent(run: Run, ours: TlsFiles) -> None:
    async def scenario() -> None:
        async with receiving(layout=MIB, tls=ours) as receiver, sending(MIB, tls=ours) as sender:
            assert isinstance(sender.region, HostRegion)
            fill_random(sender.region, 3)
            (offer,) = receiver.open(REQUEST, ids(*range(16)))
            connection = await sender.connect(offer, MIB)
            for layer in range(MIB.layers):
                await connection.write(layer, ids(0, 1, 2, 7, 9), ids(5, 6, 7, 0, 15))
            await connection.fence()
            landed, sent = slices(region_of(receiver)), slices(sender.region)
            assert (landed[:, :, [5, 6, 7, 0, 15]] == sent[:, :, [0, 1, 2, 7, 9]]).all()
            assert not landed[:, :, [1, 2, 3, 4, 8, 10, 11, 12, 13, 14]].any()
            await connection.close()

    run(scenario())


def test_links_are_used_again_and_nothing_is_left(run: Run, ours: TlsFiles) -> None:
    async def scenario() -> None:
        before = open_sockets()
        async with receiving(tls=ours) as receiver, sending(tls=ours) as sender:
            await check_serves(receiver, sender)
            first = set(receiver._inflows)
            await check_serves(receiver, sender)
            assert set(receiver._inflows) == first
            (inflow,) = first
            await sender.close()
            await inflow.ended.wait()
        for _ in range(5):  # turns of the loop, in which aborted transports close their sockets
            await asyncio.sleep(0)
        assert open_sockets() <= before

    run(scenario())


async def _written_and_fenced(connection: Connection, writing: asyncio.Future[None]) -> None:
    await writing
    await connection.fence()


async def _until(condition: Callable[[], object]) -> None:
    """Turns of the loop, of which each moves something."""
    while not condition():  # noqa: ASYNC110  (there is no event)
        await asyncio.sleep(0)


def test_a_closed_ticket_stops_what_is_half_received(run: Run, ours: TlsFiles) -> None:
    async def scenario() -> None:
        async with receiving(layout=MIB, tls=ours) as receiver, sending(MIB, tls=ours) as sender:
            assert isinstance(sender.region, HostRegion)
            fill_random(sender.region, 3)
            (offer,) = receiver.open(REQUEST, ids(*range(16)))
            connection = await sender.connect(offer, MIB)
            writing = asyncio.ensure_future(connection.write(0, ids(*range(16)), ids(*range(16))))
            await _until(lambda: any(region_of(receiver).readable(0, 0, 0, 1)[-64:]))
            receiver.close_ticket(REQUEST)
            await receiver.settle(REQUEST)
            before = bytes(region_of(receiver).memory)
            with pytest.raises(TransferError, match="closed the ticket"):
                await _written_and_fenced(connection, writing)
            assert bytes(region_of(receiver).memory) == before
            assert not any(region_of(receiver).readable(0, 1, 15, 1))
            await connection.close()

    run(scenario())


def test_a_write_that_the_receiver_does_not_take_waits_instead_of_buffering(run: Run, ours: TlsFiles) -> None:
    everything = ids(*range(16))

    async def scenario() -> None:
        async with receiving(layout=MIB, tls=ours) as receiver, sending(MIB, tls=ours, stall_timeout_s=0.2) as sender:
            (offer,) = receiver.open(REQUEST, everything)
            connection = await sender.connect(offer, MIB)
            (inflow,) = receiver._inflows
            assert isinstance(inflow, TlsInflow)
            assert inflow._transport is not None
            inflow._transport.pause_reading()
            with pytest.raises(TransferError, match=r"took nothing for 0\.2 s"):
                await connection.write(0, everything, everything)
            assert connection.bytes_written == 0

    run(scenario())


def test_no_more_than_a_piece_waits_beside_the_transports_own(run: Run, ours: TlsFiles) -> None:
    """A stalled receiver costs the sender some hundred KB, whatever it was asked to write."""
    everything = ids(*range(16))

    async def scenario() -> None:
        async with receiving(layout=MIB, tls=ours) as receiver, sending(MIB, tls=ours) as sender:
            (offer,) = receiver.open(REQUEST, everything)
            connection = await sender.connect(offer, MIB)
            (inflow,) = receiver._inflows
            assert isinstance(inflow, TlsInflow)
            assert inflow._transport is not None
            inflow._transport.pause_reading()
            writing = asyncio.ensure_future(connection.write(0, everything, everything))
            stream = connection._link._stream
            assert isinstance(stream, TlsStream)
            await _until(lambda: writing.done() or not stream._may_write.is_set())
            for _ in range(100):
                await asyncio.sleep(0)
            assert stream._transport is not None
            assert stream._transport.get_write_buffer_size() <= 3 * PIECE_BYTES
            assert not writing.done()
            await connection.close()
            with pytest.raises(TransferError, match="interrupted"):
                await writing

    run(scenario())


# ---- who is let in


def test_a_sender_of_another_authority_is_not_let_in(run: Run, ours: TlsFiles, tmp_path: Path) -> None:
    theirs = their_files(tmp_path / "theirs", authority=OURS_AUTHORITY)

    async def scenario() -> None:
        async with receiving(tls=ours) as receiver, sending(tls=theirs) as sender, sending(tls=ours) as good:
            (offer,) = receiver.open(REQUEST, ids(1))
            with pytest.raises(TransferError):
                await sender.connect(offer, LAYOUT)
            await check_serves(receiver, good)

    run(scenario())


def test_a_receiver_of_another_authority_is_not_trusted(run: Run, ours: TlsFiles, tmp_path: Path) -> None:
    theirs = their_files(tmp_path / "theirs", authority=OURS_AUTHORITY)

    async def scenario() -> None:
        async with receiving(tls=theirs) as receiver, sending(tls=ours) as sender:
            (offer,) = receiver.open(REQUEST, ids(1))
            with pytest.raises(TransferError, match="certificate is not good"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


def test_a_certificate_does_not_stand_in_for_the_cluster_secret(run: Run, ours: TlsFiles) -> None:
    async def scenario() -> None:
        async with receiving(tls=ours) as receiver, sending(tls=ours, secret=b"another cluster's") as sender:
            (offer,) = receiver.open(REQUEST, ids(1))
            with pytest.raises(TransferError, match="another cluster secret"):
                await sender.connect(offer, LAYOUT)

    run(scenario())


def test_tls_on_one_side_alone_is_told_at_once(run: Run, ours: TlsFiles) -> None:
    async def scenario() -> None:
        async with receiving(tls=ours) as receiver, sending() as sender:
            with pytest.raises(TransferError, match="by TLS alone"):
                await sender.connect(receiver.open(REQUEST, ids(1))[0], LAYOUT)
        async with receiving() as receiver, sending(tls=ours) as sender:
            with pytest.raises(TransferError, match="does no TLS"):
                await sender.connect(receiver.open(REQUEST, ids(1))[0], LAYOUT)

    run(scenario())


def test_an_older_tls_is_refused(run: Run, ours: TlsFiles) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.load_verify_locations(ours.authority)
    old.load_cert_chain(ours.certificate, ours.key)
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    async def scenario() -> None:
        async with receiving(tls=ours) as receiver:
            with pytest.raises(OSError):  # noqa: PT011  (reset or told why, as it comes)
                await asyncio.open_connection("127.0.0.1", receiver.port, ssl=old, server_hostname="")

    run(scenario())


def test_a_stranger_without_tls_costs_one_connection(run: Run, ours: TlsFiles) -> None:
    async def scenario() -> None:
        async with receiving(tls=ours) as receiver, raw(receiver) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            assert b"BKV" not in await read_to_the_end(reader)
            async with sending(tls=ours) as sender:
                await check_serves(receiver, sender)

    run(scenario())


def test_a_receiver_that_never_shakes_hands(run: Run, ours: TlsFiles) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, over: asyncio.Event) -> None:
        del reader, writer
        await over.wait()

    async def scenario() -> None:
        async with impostor(behave) as offer, sending(tls=ours, connect_timeout_s=0.05) as sender:
            address = replace(Address.unpack(offer.descriptor), is_tls=True)
            with pytest.raises(TransferError, match=r"did not answer within 0\.05 s"):
                await sender.connect(Offer("tcp", address.pack()), LAYOUT)

    run(scenario())


def test_strangers_in_a_handshake_are_cut(run: Run, ours: TlsFiles) -> None:
    async def scenario() -> None:
        async with receiving(Patience(hello_s=0.05), tls=ours) as receiver, raw(receiver) as (reader, _):
            assert await read_to_the_end(reader) == b""
            await _until(lambda: not receiver._inflows)

    run(scenario())


def test_of_many_strangers_in_a_handshake_the_oldest_is_cut(
    run: Run, ours: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver_module, "UNAUTHENTICATED_MAX", 2)

    async def scenario() -> None:
        async with receiving(tls=ours) as receiver, raw(receiver) as one, raw(receiver), raw(receiver):
            assert await read_to_the_end(one[0]) == b""
            await _until(lambda: len(receiver._inflows) == 2)
            async with sending(tls=ours) as sender:
                await check_serves(receiver, sender)

    run(scenario())


def test_closing_ends_handshakes(run: Run, ours: TlsFiles) -> None:
    async def scenario() -> None:
        async with receiving(tls=ours) as receiver, raw(receiver) as (reader, _):
            await _until(lambda: receiver._inflows)
            await receiver.close()
            assert not receiver._inflows
            await read_to_the_end(reader)

    run(scenario())


# ---- files


def test_a_renewed_certificate_is_taken_without_a_restart(run: Run, ours: TlsFiles, tmp_path: Path) -> None:
    theirs = their_files(tmp_path / "theirs")

    async def scenario() -> None:
        async with receiving(tls=ours) as receiver:
            async with sending(tls=ours) as sender:
                await check_serves(receiver, sender)
            tls_files(tmp_path / "ours", THEIRS_CERTIFICATE, THEIRS_KEY, THEIRS_AUTHORITY)
            for file in (ours.certificate, ours.key, ours.authority):
                os.utime(file, (1, 1))  # another time, however coarse the file system's clock
            async with sending(tls=theirs) as sender:
                await check_serves(receiver, sender)

    run(scenario())


def _remove(file: str) -> Callable[[TlsFiles], None]:
    return lambda files: Path(getattr(files, file)).unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_remove("certificate"), r"certificate\.pem cannot be read: No such file"),
        (_remove("authority"), r"authority\.pem cannot be read"),
        (lambda files: files.authority.write_text("none"), r"authority\.pem cannot be used"),
        (lambda files: files.key.write_text(THEIRS_KEY), r"key\.pem cannot be used"),
        (lambda files: files.key.write_text(OURS_KEY_ENCRYPTED), r"key\.pem cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(ours: TlsFiles, spoil: Callable[[TlsFiles], object], reason: str) -> None:
    spoil(ours)
    for is_server in (True, False):
        with pytest.raises(TransferError, match=reason):
            TlsContexts(ours, is_server).current()


def test_a_file_that_cannot_be_used_stops_the_start(run: Run, ours: TlsFiles) -> None:
    ours.key.unlink()

    async def scenario() -> None:
        region = HostRegion.allocate(LAYOUT)
        receiver = TcpReceiver(place(region, SECRET, ours))
        with pytest.raises(TransferError, match=r"key\.pem"):
            await receiver.start()
        await receiver.close()
        region.close()

    run(scenario())
