"""One router's stream: its requests come in by it, and their tokens go out one message an engine step."""

import asyncio
from collections.abc import Callable
from typing import TypeAlias

import grpc.aio

from baton.rpc import worker_pb2

ServeContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.ServeRequest, worker_pb2.ServeResponse]"


class Session:
    """Collects the outputs of one engine step and sends them as one message.

    The outbox is bounded by what the router asked for: a request yields at most its `max_tokens` tokens,
    and a router that does not read gets everything since in its next message.
    """

    def __init__(self) -> None:
        self._outputs: list[worker_pb2.TokenOutput] = []
        self._filled = asyncio.Event()

    def put(self, output: worker_pb2.TokenOutput) -> None:
        self._outputs.append(output)
        self._filled.set()

    async def send(self, context: "ServeContext") -> None:
        """Until cancelled."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            outputs, self._outputs = self._outputs, []
            await context.write(worker_pb2.ServeResponse(outputs=outputs))

    @staticmethod
    async def receive(context: "ServeContext", handle: Callable[[worker_pb2.ServeRequest], None]) -> None:
        """Until the router ends the stream."""
        while isinstance(message := await context.read(), worker_pb2.ServeRequest):
            handle(message)
