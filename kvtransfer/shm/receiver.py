"""The decode side: it lets others map the region, and says which tickets are open. No byte passes through it."""

import asyncio
from collections.abc import Sequence

from baton.ids import BlockId, RequestId
from kvtransfer.interface import Offer, Region
from kvtransfer.memory import SharedMemory
from kvtransfer.shm.fence import is_clear
from kvtransfer.shm.table import TABLE_BYTES, TICKETS_MAX, TRANSPORT, Invitation, put
from kvtransfer.tickets import SECRET_BYTES, Ticket, TicketBook

POLL_FIRST_S, POLL_LAST_S = 0.000_5, 0.05
"""Between looks at a copy under way: a run takes about half a millisecond, a stopped writer as long as it likes."""


class ShmReceiver:
    """Gives no offers where the region cannot be shared."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._tickets = TicketBook()
        self._free_slots = list(range(TICKETS_MAX))
        self._slots: dict[Ticket, int] = {}
        self._unsettled: dict[RequestId, list[int]] = {}
        """Numbers of closed tickets under which a copy was under way: no more than all writers have copy threads."""
        self._table: SharedMemory | None = None

    async def start(self) -> None:
        self._table = SharedMemory(TABLE_BYTES)

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Sequence[Offer]:
        assert self._table is not None, "start() comes first"
        self.close_ticket(request_id)
        region = self._region.share()
        if region is None or not self._free_slots:
            return ()
        ticket = self._tickets.open(request_id, blocks)
        slot = self._slots[ticket] = self._free_slots.pop()
        put(self._table.memory, slot, ticket.secret)
        invitation = Invitation(self._table.share(), ticket.number, slot, ticket.secret, tuple(blocks), region)
        return (Offer(TRANSPORT, invitation.pack()),)

    def close_ticket(self, request_id: RequestId) -> None:
        if ticket := self._tickets.close(request_id):
            self._withdraw(ticket)
            if not self._is_settled(ticket.number):
                self._unsettled.setdefault(request_id, []).append(ticket.number)

    def _withdraw(self, ticket: Ticket) -> None:
        assert self._table is not None
        slot = self._slots.pop(ticket)
        put(self._table.memory, slot, bytes(SECRET_BYTES))
        self._free_slots.append(slot)

    async def settle(self, request_id: RequestId) -> None:
        """Returns, too, when this receiver closes."""
        pause_s = POLL_FIRST_S
        while not self._settle_now(request_id):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_LAST_S)

    def _settle_now(self, request_id: RequestId) -> bool:
        left = [number for number in self._unsettled.pop(request_id, ()) if not self._is_settled(number)]
        if left:
            self._unsettled[request_id] = left
        return not left

    def _is_settled(self, number: int) -> bool:
        return self._table is None or is_clear(self._table.share().fd, number)

    async def close(self) -> None:
        """What still is in a copy writes into a region that its owner is done with."""
        self._tickets.close_all()
        for ticket in tuple(self._slots):
            self._withdraw(ticket)
        self._unsettled.clear()
        if self._table is not None:
            self._table.close()
            self._table = None
