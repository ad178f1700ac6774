"""The other routers: asked what they decided, each by its own gRPC door."""

import asyncio
from collections.abc import Callable, Sequence

import grpc.aio

from baton.cluster.router_info import RouterInfo
from baton.ids import RequestId
from baton.rpc import inference_pb2, inference_pb2_grpc
from baton.service import CHANNEL_OPTIONS

ASK_TIMEOUT_S = 2.0
ASKED_MAX = 64


class Peers:
    def __init__(self, routers: Callable[[], Sequence[RouterInfo]]) -> None:
        """`routers` gives the others, this one not among them."""
        self._routers = routers

    def known(self) -> Sequence[RouterInfo]:
        return self._routers()

    async def decision(self, request_id: RequestId, authorization: str | None = None) -> inference_pb2.Decision | None:
        """What another router knows and tells to whom the Authorization header names; the latest, where several do.
        None within ASK_TIMEOUT_S if none of the first ASKED_MAX answers that it does."""
        asked = [_ask(router.grpc_address, request_id, authorization) for router in self._routers()[:ASKED_MAX]]
        found = [answer for answer in await asyncio.gather(*asked) if answer is not None and answer.placements]
        return max(found, key=lambda decision: decision.placements[-1].decided_at, default=None)


async def _ask(address: str, request_id: RequestId, authorization: str | None) -> inference_pb2.Decision | None:
    request = inference_pb2.GetDecisionRequest(request_id=request_id, this_router_only=True)
    metadata = () if authorization is None else (("authorization", authorization),)
    try:
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            decision: inference_pb2.Decision = await inference_pb2_grpc.InferenceStub(channel).GetDecision(
                request, timeout=ASK_TIMEOUT_S, metadata=metadata
            )
            return decision
    except grpc.aio.AioRpcError:
        return None  # it does not know, or is gone: either way there is nothing to tell
