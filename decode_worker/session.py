"""One router's stream: its requests come in by it, and their tokens go out one message an engine step."""

import asyncio
from typing import Protocol, TypeAlias

import grpc.aio

from baton.ids import RequestId
from baton.rpc import worker_pb2, worker_pb2_grpc
from decode_worker.request import Outbox

ServeContext: TypeAlias = "grpc.aio.ServicerContext[worker_pb2.ServeRequest, worker_pb2.ServeResponse]"


class Requests(Protocol):
    """What routers ask of the worker; every answer goes through the outbox."""

    def submit(self, message: worker_pb2.Submit, outbox: Outbox) -> None: ...

    def cancel(self, request_id: RequestId, outbox: Outbox) -> None: ...

    def cancel_all(self, outbox: Outbox) -> None: ...


class DecodeServicer(worker_pb2_grpc.DecodeWorkerServicer):
    """Each call is one router; when it ends, so do the requests that came by it."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    async def Serve(self, request_iterator: object, context: ServeContext) -> None:  # noqa: N802 - gRPC's name
        del request_iterator  # read through the context, which knows the end of the stream
        session = Session()
        sends = asyncio.ensure_future(session.send(context))
        receives = asyncio.ensure_future(self._receive(context, session))
        try:
            done, _ = await asyncio.wait({sends, receives}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._requests.cancel_all(session)
            for task in (sends, receives):
                task.cancel()
            await asyncio.gather(sends, receives, return_exceptions=True)

    async def _receive(self, context: ServeContext, session: "Session") -> None:
        """Until the router ends the stream."""
        while isinstance(message := await context.read(), worker_pb2.ServeRequest):
            match message.WhichOneof("message"):
                case "submit":
                    self._requests.submit(message.submit, session)
                case "cancel":
                    self._requests.cancel(RequestId(message.cancel.request_id), session)


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
