"""Speaks with decode workers as routers do, one request at a time."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc.aio

from baton.rpc import worker_pb2, worker_pb2_grpc
from baton.service import CHANNEL_OPTIONS

ANSWER_TIMEOUT_S = 120.0
ServeCall: TypeAlias = "grpc.aio.StreamStreamCall[worker_pb2.ServeRequest, worker_pb2.ServeResponse]"


class RequestFailed(Exception):
    """A worker answered with an error, or otherwise than it was asked to."""


@asynccontextmanager
async def serving(addresses: Mapping[str, str]) -> AsyncIterator[Mapping[str, ServeCall]]:
    """A stream to each of these workers, by name."""
    channels = {name: grpc.aio.insecure_channel(address, CHANNEL_OPTIONS) for name, address in addresses.items()}
    calls = {name: worker_pb2_grpc.DecodeWorkerStub(channel).Serve() for name, channel in channels.items()}
    try:
        yield calls
    finally:
        for call in calls.values():
            call.cancel()
        for channel in channels.values():
            await channel.close()


async def first_output(call: ServeCall, submit: worker_pb2.Submit) -> tuple[worker_pb2.TokenOutput, float]:
    """Of a request alone on its stream, and the seconds until it came. Raises RequestFailed."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        start_s = time.perf_counter()
        await call.write(worker_pb2.ServeRequest(submit=submit))
        response = await call.read()
        ttft_s = time.perf_counter() - start_s
    if not isinstance(response, worker_pb2.ServeResponse):
        raise RequestFailed("the decode worker ended the stream")
    return response.outputs[0], ttft_s
