"""The gRPC service that every worker answers, whatever its role: how it is, what its cache holds, and to clear that."""

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Protocol, TypeAlias

import grpc.aio

from baton.errors import BatonError
from baton.rpc import worker_pb2, worker_pb2_grpc
from baton.rpc.status_codes import status_code

StatusContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.GetStatusRequest, worker_pb2.WorkerStatus]"
SnapshotContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.GetCacheSnapshotRequest, worker_pb2.CacheSnapshot]"
CacheStatusContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.GetCacheStatusRequest, worker_pb2.CacheStatus]"
ClearContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.ClearCacheRequest, worker_pb2.ClearCacheResponse]"


class Cache(Protocol):
    """Both raise BatonError."""

    async def status(self, top_prefixes: int) -> worker_pb2.CacheStatus: ...

    async def clear(self, tenant: str) -> worker_pb2.ClearCacheResponse: ...


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    def __init__(
        self,
        status: Callable[[], worker_pb2.WorkerStatus],
        snapshot: Callable[[], Iterable[worker_pb2.CacheSnapshot]],
        cache: Cache,
    ) -> None:
        """`snapshot` is of the moment of the call, however slowly it is read."""
        self._status, self._snapshot, self._cache = status, snapshot, cache

    async def GetStatus(  # noqa: N802 - gRPC's name
        self,
        request: worker_pb2.GetStatusRequest,
        context: StatusContext,
    ) -> worker_pb2.WorkerStatus:
        del request, context
        return self._status()

    async def GetCacheSnapshot(  # noqa: N802 - gRPC's name
        self,
        request: worker_pb2.GetCacheSnapshotRequest,
        context: SnapshotContext,
    ) -> AsyncIterator[worker_pb2.CacheSnapshot]:
        del request, context
        for message in self._snapshot():
            yield message

    async def GetCacheStatus(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.GetCacheStatusRequest, context: CacheStatusContext
    ) -> worker_pb2.CacheStatus:
        try:
            return await self._cache.status(request.top_prefixes)
        except BatonError as error:
            await context.abort(status_code(error), str(error))

    async def ClearCache(  # noqa: N802 - gRPC's name
        self, request: worker_pb2.ClearCacheRequest, context: ClearContext
    ) -> worker_pb2.ClearCacheResponse:
        try:
            return await self._cache.clear(request.tenant)
        except BatonError as error:
            await context.abort(status_code(error), str(error))
