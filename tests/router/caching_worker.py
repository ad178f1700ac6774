"""A worker that is only its cache: it publishes KV events and answers GetCacheSnapshot, as told."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import grpc.aio
from redis.asyncio import Redis

from baton.cluster.cache_events import CacheChanges, unpack
from baton.cluster.cache_publisher import CacheEventPublisher
from baton.cluster.lease import Lease
from baton.cluster.worker_info import WorkerInfo
from baton.ids import BlockHash, WorkerId
from baton.latency import Tier
from baton.rpc import worker_pb2, worker_pb2_grpc


def names(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(sha256(str(number).encode()).digest()[:16]) for number in numbers)


class CachingWorker(worker_pb2_grpc.WorkerServicer):
    """An async context manager. `begin_anew` is a restart under the same name, at the same address."""

    def __init__(self, redis: Redis, key_prefix: str, name: str) -> None:
        self.worker_id = WorkerId(name)
        self.snapshots = 0
        self.failures = 0
        """So many snapshots fail from now on."""
        self.gate: asyncio.Event | None = None
        """Where set, a snapshot is taken at once and delivered only when the gate opens."""
        self.asked = asyncio.Event()
        self._redis, self._key_prefix = redis, key_prefix
        self._port = 0

    async def __aenter__(self) -> "CachingWorker":
        await self._begin()
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.publisher.close()
        await self.hang_up()

    async def listen(self) -> None:
        """On the port of its last life, if it had one."""
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        await self._server.start()

    async def hang_up(self) -> None:
        await self._server.stop(0)
        await asyncio.sleep(0)

    async def begin_anew(self) -> None:
        await self.publisher.close()
        await self._begin()

    async def _begin(self) -> None:
        self.epoch = secrets.token_hex(4)
        self.publisher = CacheEventPublisher(
            self._redis, self._key_prefix, self.worker_id, self.epoch, Lease(retry_max_s=0.05)
        )
        await self.publisher.start()

    def store(self, *blocks: BlockHash, tier: Tier = "hbm") -> None:
        self.publisher.record(CacheChanges({tier: blocks}))

    def remove(self, *blocks: BlockHash) -> None:
        self.publisher.record(CacheChanges(removed=blocks))

    @property
    def held(self) -> dict[BlockHash, Tier]:
        blocks = self.publisher.inventory().blocks
        return {name: tier for tier, packed in blocks.items() for name in unpack(packed)}

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            role="decode",
            state="ready",
            address=f"127.0.0.1:{self._port}",
            model="m",
            fingerprint="f",
            context_length=1000,
            vocabulary_size=400,
            block_tokens=16,
            kv_dtype="float32",
            kv_blocks_total=1000,
            epoch=self.epoch,
            cache_sequence=self.publisher.sequence,
        )

    async def GetCacheSnapshot(  # noqa: N802 - gRPC's name
        self, request: object, context: Any
    ) -> AsyncIterator[worker_pb2.CacheSnapshot]:
        del request
        messages = list(self.publisher.inventory().messages())
        self.asked.set()
        if self.failures:
            self.failures -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        self.snapshots += 1
        if self.gate is not None:
            await self.gate.wait()
        for message in messages:
            yield message
