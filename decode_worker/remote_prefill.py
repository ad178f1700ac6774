"""Has a request's reserved blocks filled by a prefill worker."""

import logging
from collections.abc import Sequence

from baton.errors import TransferError, Unavailable
from baton.ids import BlockId
from baton.rpc import transfer_pb2, worker_pb2
from baton.rpc.convert import layout_to_proto, sampling_to_proto
from decode_worker.prefill_client import PrefillClient
from decode_worker.request import ActiveRequest
from engine.interface import ModelInfo
from kvtransfer.registry import Ports

log = logging.getLogger(__name__)

PREFILL_ATTEMPTS_MAX = 3
DEADLINE_GRACE_S = 1.0
"""How much later than the request a ticket expires: in time it is taken back, which is answered at once and leaves no
doubt about what is still written. Its own deadline is for a decode worker that cannot take it back any more."""


class RemotePrefill:
    def __init__(self, model: ModelInfo, ports: Ports, client: PrefillClient, timeout_s: float) -> None:
        self._model, self._ports, self._client, self._timeout_s = model, ports, client, timeout_s
        self._transports = [name for name in ports.transports if name not in ("nixl", "ucx")]

    async def start(self) -> None:
        for transport in self._transports:
            await self._ports.start(transport)

    async def close(self) -> None:
        await self._client.close()
        await self._ports.close()

    async def fill(self, request: ActiveRequest, blocks: Sequence[BlockId]) -> worker_pb2.PrefillCommit | None:
        """Asks the candidates one after another; None: none of them could.

        Raises PrefillCancelled once the request is cancelled. Whatever the outcome, nothing writes into the
        blocks any more when this ends.
        """
        for candidate in request.candidates:
            try:
                ticket = self._open_ticket(request, blocks)
                started, commit = await self._client.prefill(candidate.address, ticket, request.cancelled)
            except (Unavailable, TransferError) as error:
                log.warning("request %s: %s", request.request_id, error)
                request.failed_prefill_workers.append(candidate.worker_id)
            else:
                request.committed(candidate.worker_id, started, commit)
                return commit
            finally:
                self._ports.close_ticket(request.request_id)
        return None

    def _open_ticket(self, request: ActiveRequest, blocks: Sequence[BlockId]) -> worker_pb2.Ticket:
        first_block = request.cached_tokens // self._model.layout.block_tokens
        offers = [self._ports.open(name, request.request_id, blocks[first_block:]) for name in self._transports]
        return worker_pb2.Ticket(
            request_id=request.request_id,
            prompt=request.prompt,
            generated=request.generated,
            sampling=sampling_to_proto(request.sampling),
            cache_salt=request.cache_salt,
            layout=layout_to_proto(self._model.layout),
            fingerprint=self._model.fingerprint,
            first_block=first_block,
            blocks=blocks[first_block:],
            offers=[transfer_pb2.TransportOffer(transport=o.transport, descriptor=o.descriptor) for o in offers],
            deadline_s=min(self._timeout_s, max(request.remaining_s, 0.0) + DEADLINE_GRACE_S),
        )
