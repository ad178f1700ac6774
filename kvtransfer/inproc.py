"""Within one process: from region to region. For tests, and as the reference of what transports do."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from kvtransfer.connection import CLOSED, MeasuredConnection
from kvtransfer.interface import Offer, Region
from kvtransfer.metrics import TransferMetrics
from kvtransfer.runs import copy_run, run_blocks_max, runs_of
from kvtransfer.tickets import Ticket, TicketBook

TRANSPORT = "inproc"


@dataclass(frozen=True, slots=True)
class _Door:
    region: Region
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class InprocHub:
    """Where receivers and senders of one process find each other; pass the same one to both."""

    doors: dict[bytes, _Door] = field(default_factory=dict, repr=False)
    """By the ticket's secret."""


class InprocReceiver:
    def __init__(self, hub: InprocHub, region: Region) -> None:
        self._hub, self._region = hub, region
        self._tickets = TicketBook()

    async def start(self) -> None:
        """Nothing to do."""

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Sequence[Offer]:
        self.close_ticket(request_id)
        ticket = self._tickets.open(request_id, blocks)
        self._hub.doors[ticket.secret] = _Door(self._region, ticket)
        return (Offer(TRANSPORT, ticket.secret),)

    def close_ticket(self, request_id: RequestId) -> None:
        if ticket := self._tickets.close(request_id):
            del self._hub.doors[ticket.secret]

    async def settle(self, request_id: RequestId) -> None:
        """At once: nothing lands without this process, which asks the ticket before each copy."""

    async def close(self) -> None:
        for secret, door in tuple(self._hub.doors.items()):
            if door.region is self._region:
                del self._hub.doors[secret]
        self._tickets.close_all()


class InprocSender:
    transport = TRANSPORT

    def __init__(self, hub: InprocHub, region: Region, metrics: TransferMetrics) -> None:
        self._hub, self._region, self._metrics = hub, region, metrics

    async def connect(self, offer: Offer, layout: KVLayout) -> "InprocConnection":
        door = self._hub.doors.get(offer.descriptor)
        if door is None:
            raise TransferError("The ticket is closed or was given in another process.")
        if door.region.layout != layout:
            raise TransferError("The region of the peer has another layout than it said.")
        return InprocConnection(self._region, door, self._metrics)

    async def close(self) -> None:
        """Nothing to do: connections hold nothing."""


class InprocConnection(MeasuredConnection):
    transport = TRANSPORT

    def __init__(self, source: Region, door: _Door, metrics: TransferMetrics) -> None:
        super().__init__(source, door.region.layout, metrics)
        self._door = door
        self._is_stopped = False

    async def _write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        self._door.ticket.check(target)
        region = self._door.region
        for run in runs_of(source, target, run_blocks_max(self._target)):
            for kv in (0, 1):
                self._check_open()
                place = region.writable(layer, kv, run.target, run.blocks)
                copy_run(self._source, layer, kv, run, place)
                region.written(layer, kv, run.target, run.blocks, place)
                await asyncio.sleep(0)  # the loop's turn

    async def _fence(self) -> None:
        self._check_open()

    def _check_open(self) -> None:
        if self._is_stopped:
            raise TransferError(CLOSED)
        self._door.ticket.check(())

    def _interrupt(self) -> None:
        self._is_stopped = True

    def _release(self) -> None:
        """Holds nothing."""
