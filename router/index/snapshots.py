"""Snapshots of workers' caches, asked of the workers themselves."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import grpc.aio

from baton.cluster.cache_events import MalformedEvents, from_sets
from baton.cluster.worker_info import WorkerInfo
from baton.rpc import worker_pb2, worker_pb2_grpc
from baton.service import CHANNEL_OPTIONS
from router.index.prefix_index import PrefixIndex, Restoration

SNAPSHOT_TIMEOUT_S = 30.0
"""For all of one: 10 million blocks at 6 MB/s."""


class SnapshotFailed(Exception):
    """A worker gave none; the message says why, and that the next try may succeed."""


class SnapshotSource(Protocol):
    def pull(self, worker: WorkerInfo) -> AsyncGenerator[worker_pb2.CacheSnapshot, None]:
        """Raises SnapshotFailed."""
        ...


class GrpcSnapshots:
    """By GetCacheSnapshot, over a connection of its own each time: they are rare, and large."""

    def __init__(self, timeout_s: float = SNAPSHOT_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s

    async def pull(self, worker: WorkerInfo) -> AsyncGenerator[worker_pb2.CacheSnapshot, None]:
        try:
            async with grpc.aio.insecure_channel(worker.address, options=CHANNEL_OPTIONS) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                request = worker_pb2.GetCacheSnapshotRequest()
                async for message in stub.GetCacheSnapshot(request, timeout=self._timeout_s):
                    yield message
        except grpc.aio.AioRpcError as error:
            raise SnapshotFailed(f"GetCacheSnapshot failed: {error.code().name}") from None


async def restore_from(source: SnapshotSource, worker: WorkerInfo, index: PrefixIndex) -> None:
    """The worker's cache as it is now into the index, message by message. Raises SnapshotFailed; then the index is as
    it was."""
    restoration = index.begin_restore(worker.worker_id, worker.epoch)
    try:
        sequence = await _fill(restoration, source, worker)
    except MalformedEvents as error:
        restoration.abandon()
        raise SnapshotFailed(str(error)) from None
    except BaseException:
        restoration.abandon()
        raise
    restoration.finish(sequence)


async def _fill(restoration: Restoration, source: SnapshotSource, worker: WorkerInfo) -> int:
    """Returns the sequence number of the last batch in it."""
    sequence = None
    async with aclosing(source.pull(worker)) as messages:
        async for message in messages:
            if message.epoch != worker.epoch:
                raise SnapshotFailed("the worker began a new life")
            sequence = message.sequence
            for tier, names in from_sets(message.blocks).items():
                restoration.add(tier, names)
    if sequence is None:
        raise SnapshotFailed("the worker sent nothing")
    return sequence
