"""Has a request's reserved blocks filled by a prefill worker: link, ticket, attempt, fence."""

import asyncio
import itertools
import logging
from collections.abc import Sequence

from baton.errors import BatonError
from baton.ids import BlockId, RequestId
from baton.rpc import transfer_pb2, worker_pb2
from baton.rpc.convert import layout_to_proto, sampling_to_proto
from decode_worker.attempt import Filled
from decode_worker.fence import Fence, Unsettled
from decode_worker.prefill_client import PrefillCancelled, PrefillClient
from decode_worker.request import ActiveRequest
from engine.interface import ModelInfo
from engine.retention import retention_to_proto
from kvtransfer.interface import Offer
from kvtransfer.link.client import Link, Links
from kvtransfer.link.proof import UnknownLink
from kvtransfer.registry import Ports

log = logging.getLogger(__name__)

PREFILL_ATTEMPTS_MAX = 3
DEADLINE_GRACE_S = 1.0
"""How much later than the request a ticket expires: in time it is taken back, which is answered at once and leaves no
doubt about what is still written. Its own deadline is for a decode worker that cannot take it back any more."""


class RemotePrefill:
    def __init__(
        self, model: ModelInfo, ports: Ports, links: Links, client: PrefillClient, fence: Fence, timeout_s: float
    ) -> None:
        self._model, self._ports, self._links = model, ports, links
        self.fence = fence
        self._client, self._timeout_s = client, timeout_s
        self._ticket_numbers = itertools.count()

    async def close(self) -> None:
        await self._client.close()
        await self.fence.close()

    async def fill(self, request: ActiveRequest, blocks: Sequence[BlockId]) -> Filled | None:
        """Asks the candidates that were not asked yet, one after another; None: none of them could.

        Raises PrefillCancelled once the request is cancelled, Unsettled if somebody may still write into the blocks. In
        all other cases nobody does when this ends.
        """
        lacking = blocks[request.cached_tokens // self._model.layout.block_tokens :]
        while candidate := request.next_candidate():
            try:
                filled = await self._ask(request, candidate, lacking)
            except BatonError as error:
                log.warning("request %s: %s", request.request_id, error)
                request.failed_prefill_workers.append(candidate.worker_id)
            except Unsettled:
                request.failed_prefill_workers.append(candidate.worker_id)
                raise
            else:
                request.committed(candidate.worker_id, filled.started, filled.commit)
                return filled
        return None

    async def _ask(
        self, request: ActiveRequest, candidate: worker_pb2.PrefillCandidate, lacking: Sequence[BlockId]
    ) -> Filled:
        """Once more by a new link, where the prefill worker does not know the link."""
        address = candidate.address
        link = await self._link(address, request.cancelled)
        try:
            return await self._ask_by(link, request, candidate, lacking)
        except UnknownLink as error:
            log.info("request %s, %s: %s", request.request_id, link.worker_id, error)
            self._links.drop(address, link)
            return await self._ask_by(await self._link(address, request.cancelled), request, candidate, lacking)

    async def _ask_by(
        self,
        link: Link,
        request: ActiveRequest,
        candidate: worker_pb2.PrefillCandidate,
        lacking: Sequence[BlockId],
    ) -> Filled:
        # A ticket of its own for each attempt: whether an earlier one is settled is another question.
        ticket_id = RequestId(f"{request.request_id}/{next(self._ticket_numbers)}")
        try:
            ticket = self._ticket(request, lacking, self._ports.open(link.transport, ticket_id, lacking))
            if candidate.HasField("fetch"):
                ticket.fetch.CopyFrom(candidate.fetch)
            link.sign(ticket)
            return await self._client.prefill(link.address, ticket, request.cancelled)
        finally:
            await self.fence.shut(ticket_id)

    async def _link(self, address: str, cancelled: asyncio.Event) -> Link:
        """Its making is bounded by itself."""
        making = asyncio.ensure_future(self._links.to(address))
        taken_back = asyncio.ensure_future(cancelled.wait())
        try:
            await asyncio.wait({making, taken_back}, return_when=asyncio.FIRST_COMPLETED)
            if taken_back.done():
                raise PrefillCancelled
            return making.result()
        finally:
            for task in (making, taken_back):
                task.cancel()
            await asyncio.gather(making, taken_back, return_exceptions=True)

    def _ticket(self, request: ActiveRequest, lacking: Sequence[BlockId], offer: Offer) -> worker_pb2.Ticket:
        return worker_pb2.Ticket(
            request_id=request.request_id,
            prompt=request.prompt,
            generated=request.generated,
            sampling=sampling_to_proto(request.sampling),
            cache_salt=request.cache_salt,
            layout=layout_to_proto(self._model.layout),
            fingerprint=self._model.fingerprint,
            first_block=request.cached_tokens // self._model.layout.block_tokens,
            blocks=lacking,
            offers=[transfer_pb2.TransportOffer(transport=offer.transport, descriptor=offer.descriptor)],
            deadline_s=min(self._timeout_s, max(request.remaining_s, 0.0) + DEADLINE_GRACE_S),
            retention=retention_to_proto(request.retention),
        )
