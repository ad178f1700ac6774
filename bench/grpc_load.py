"""The load generator for Baton's own gRPC API; as bench.load is for HTTP."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from baton.clock import monotonic
from baton.rpc import inference_pb2, inference_pb2_grpc
from baton.service import CHANNEL_OPTIONS
from bench.measure import Chunk, Completed, Failed, Outcome

STREAMS_PER_CHANNEL = 100
"""What servers commonly allow on one connection."""


@dataclass(frozen=True, slots=True)
class GrpcClient:
    address: str
    timeout_s: float

    async def run(
        self, concurrency: int, requests: Sequence[inference_pb2.GenerateRequest], advance: Callable[[], None]
    ) -> list[Outcome]:
        """Sends all requests, so many at a time; calls `advance` after each."""
        left = iter(requests)  # shared: each client takes the next one
        channels = [self._channel(number) for number in range(-(-concurrency // STREAMS_PER_CHANNEL))]
        try:
            async with asyncio.TaskGroup() as group:
                clients = [
                    group.create_task(self._send_all(channels[number % len(channels)], left, advance))
                    for number in range(concurrency)
                ]
            return [outcome for client in clients for outcome in client.result()]
        finally:
            for channel in channels:
                await channel.close()

    def _channel(self, number: int) -> grpc.aio.Channel:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("baton.channel", number)]
        return grpc.aio.insecure_channel(self.address, options=options)

    async def _send_all(
        self,
        channel: grpc.aio.Channel,
        requests: Iterator[inference_pb2.GenerateRequest],
        advance: Callable[[], None],
    ) -> list[Outcome]:
        stub, outcomes = inference_pb2_grpc.InferenceStub(channel), []
        for request in requests:
            outcomes.append(await self._send(stub, request))
            advance()
        return outcomes

    async def _send(self, stub: Any, request: inference_pb2.GenerateRequest) -> Outcome:
        start_s, usage = monotonic(), None
        chunks: list[Chunk] = []
        try:
            async for response in stub.Generate(request, timeout=self.timeout_s):
                if response.token_ids:
                    chunks.append(Chunk(monotonic(), len(response.token_ids)))
                if response.finish_reason:
                    usage = response.usage
        except grpc.aio.AioRpcError as error:
            return Failed(f"{error.code().name}: {error.details()}"[:200])
        if not chunks or usage is None:
            return Failed("the stream ended without its tokens or usage")
        return Completed(
            start_s, monotonic(), tuple(chunks), usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
        )
