"""The gRPC service that every worker answers, whatever its role: how it is, and what its cache holds."""

from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeAlias

import grpc.aio

from baton.rpc import worker_pb2, worker_pb2_grpc

StatusContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.GetStatusRequest, worker_pb2.WorkerStatus]"
SnapshotContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.GetCacheSnapshotRequest, worker_pb2.CacheSnapshot]"


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    def __init__(
        self,
        status: Callable[[], worker_pb2.WorkerStatus],
        snapshot: Callable[[], Iterable[worker_pb2.CacheSnapshot]],
    ) -> None:
        """`snapshot` is of the moment of the call, however slowly it is read."""
        self._status, self._snapshot = status, snapshot

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
