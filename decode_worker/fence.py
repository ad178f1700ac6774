"""Between a ticket's end and the next use of its blocks: nothing may land any more, whoever still writes.

Closing a ticket withdraws it; when a writer that is in the middle of a copy is out of it, or dead, the transport knows
(`settle`). Nearly always that is at once. Where it is not within SETTLE_TIMEOUT_S, such as with a writer that was
stopped half-way, the blocks are given up for the time being: the request goes on in others, and these return to the
pool when the transport has seen the end of it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge

from baton.ids import RequestId

log = logging.getLogger(__name__)

SETTLE_TIMEOUT_S = 5.0


class Tickets(Protocol):
    """What a fence asks of the ports."""

    def close_ticket(self, request_id: RequestId) -> None: ...

    async def settle(self, request_id: RequestId) -> None: ...


class Unsettled(Exception):
    """Somebody may still write into the ticket's blocks; `settling` ends when nobody can."""

    def __init__(self, settling: "asyncio.Task[None]") -> None:
        super().__init__(f"A ticket was not settled within {SETTLE_TIMEOUT_S:g} s.")
        self.settling = settling


class Fence:
    """One worker's, on its loop."""

    def __init__(self, ports: Tickets, reclaim: Callable[[RequestId], None], registry: CollectorRegistry) -> None:
        """`reclaim` is called once nobody writes any more into what was quarantined under a request's id."""
        self._ports, self._reclaim = ports, reclaim
        self._unsettled: Counter[RequestId] = Counter()
        self._settling: set[asyncio.Task[None]] = set()
        self._quarantined = Gauge(
            "baton_kv_blocks_quarantined",
            "KV blocks out of the pool because somebody may still write into them",
            registry=registry,
        )

    async def shut(self, ticket_id: RequestId) -> None:
        """Closes the ticket and returns when nothing can land under it any more. Raises Unsettled if that takes longer
        than SETTLE_TIMEOUT_S; what it holds must go to `quarantine`."""
        self._ports.close_ticket(ticket_id)
        settling = asyncio.create_task(self._ports.settle(ticket_id))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        await asyncio.wait({settling}, timeout=SETTLE_TIMEOUT_S)
        if not settling.done():
            raise Unsettled(settling)
        settling.result()

    def quarantine(self, request_id: RequestId, blocks: int, unsettled: Unsettled) -> None:
        """The engine has abandoned the request with so many blocks; they are reclaimed when this ticket, and every
        other under the same id, is settled at last."""
        log.warning("request %s: %d KV blocks stay out of the pool until their writer is gone", request_id, blocks)
        self._unsettled[request_id] += 1
        self._quarantined.inc(blocks)

        def settled(settling: "asyncio.Task[None]") -> None:
            if settling.cancelled():  # the worker stops
                return
            if error := settling.exception():
                log.error("%d KV blocks stay out of the pool", blocks, exc_info=error)
                return
            self._quarantined.dec(blocks)
            self._unsettled[request_id] -= 1
            if not self._unsettled[request_id]:
                del self._unsettled[request_id]
                self._reclaim(request_id)

        unsettled.settling.add_done_callback(settled)

    async def close(self) -> None:
        """Waits no longer: the region goes with the worker."""
        for settling in tuple(self._settling):
            settling.cancel()
        await asyncio.gather(*self._settling, return_exceptions=True)
