"""The decode side: it lets others map the region, and says which tickets are open. No byte passes through it."""

from collections.abc import Sequence

from baton.ids import BlockId, RequestId
from kvtransfer.interface import Offer, Region
from kvtransfer.memory import SharedMemory
from kvtransfer.shm.table import TABLE_BYTES, TICKETS_MAX, TRANSPORT, Invitation, put
from kvtransfer.tickets import SECRET_BYTES, Ticket, TicketBook


class ShmReceiver:
    """Gives no offers where the region cannot be shared."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._tickets = TicketBook()
        self._free_slots = list(range(TICKETS_MAX))
        self._slots: dict[Ticket, int] = {}
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
        invitation = Invitation(self._table.share(), slot, ticket.secret, tuple(blocks), region)
        return (Offer(TRANSPORT, invitation.pack()),)

    def close_ticket(self, request_id: RequestId) -> None:
        if ticket := self._tickets.close(request_id):
            self._withdraw(ticket)

    def _withdraw(self, ticket: Ticket) -> None:
        assert self._table is not None
        slot = self._slots.pop(ticket)
        put(self._table.memory, slot, bytes(SECRET_BYTES))
        self._free_slots.append(slot)

    async def settle(self, request_id: RequestId) -> None:
        """At once: nothing lands without this process, which asks the ticket before each copy."""

    async def close(self) -> None:
        self._tickets.close_all()
        for ticket in tuple(self._slots):
            self._withdraw(ticket)
        if self._table is not None:
            self._table.close()
            self._table = None
