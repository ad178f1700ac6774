"""The receiving side's memory of who may write where."""

import itertools
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baton.errors import TransferError
from baton.ids import BlockId, RequestId

SECRET_BYTES = 16


@dataclass(slots=True, eq=False)
class Ticket:
    """The right to write into some blocks, for whoever knows the secret."""

    number: int
    blocks: frozenset[BlockId]
    secret: bytes = field(repr=False)
    is_open: bool = True
    """Asked before each copy: once false it stays so, and nothing lands any more."""

    def check(self, target: Iterable[BlockId]) -> None:
        """Raises TransferError if the ticket is closed or does not cover a block."""
        if not self.is_open:
            raise TransferError("The receiver has closed the ticket.")
        check_covered(self.blocks, target)


def check_covered(blocks: frozenset[BlockId], target: Iterable[BlockId]) -> None:
    if not blocks.issuperset(target):
        raise TransferError("A target block is not part of the ticket.")


class TicketBook:
    """Open tickets, one per request."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._by_request: dict[RequestId, Ticket] = {}
        self._by_number: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._by_number)

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Ticket:
        """Closes an earlier ticket of the same request."""
        self.close(request_id)
        ticket = Ticket(next(self._numbers), frozenset(blocks), secrets.token_bytes(SECRET_BYTES))
        self._by_request[request_id] = self._by_number[ticket.number] = ticket
        return ticket

    def find(self, number: int) -> Ticket | None:
        return self._by_number.get(number)

    def close(self, request_id: RequestId) -> Ticket | None:
        """The ticket that this closed, if there was one."""
        if ticket := self._by_request.pop(request_id, None):
            ticket.is_open = False
            del self._by_number[ticket.number]
        return ticket

    def close_all(self) -> None:
        for request_id in tuple(self._by_request):
            self.close(request_id)
