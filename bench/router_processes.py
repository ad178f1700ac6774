"""The two processes that bench.router_load starts: decode workers that are stubs, and the router in front of them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from baton.cluster.worker_info import WorkerInfo
from baton.settings import RouterSettings, load_settings
from bench import child
from bench.stub_worker import StubWorker
from bench.text_model import VOCABULARY

MODEL = "stub"


@dataclass(frozen=True, slots=True)
class Doors:
    http_url: str
    grpc_address: str


class ListedMembership:
    """The members are a list, for good."""

    def __init__(self, workers: Sequence[WorkerInfo]) -> None:
        self._workers = workers

    def workers(self) -> Sequence[WorkerInfo]:
        return self._workers

    async def changed(self) -> None:
        await asyncio.Event().wait()


def run_workers(pipe: Connection, text: Sequence[int], count: int, step_s: float) -> None:
    """Says what the workers are."""

    async def service() -> AsyncIterator[list[WorkerInfo]]:
        stubs = [StubWorker(f"stub-{number}", MODEL, VOCABULARY, text, step_s) for number in range(count)]
        async with AsyncExitStack() as stack:
            for stub in stubs:
                await stack.enter_async_context(stub)
            yield [stub.info for stub in stubs]

    child.serve(pipe, service)


def run_router(pipe: Connection, model_directory: Path, workers: Sequence[WorkerInfo]) -> None:
    """Says where its doors are."""
    from router.app import Router  # here, so that the other processes do not load what only this one needs

    async def service() -> AsyncIterator[Doors]:
        settings = load_settings(RouterSettings, {"model": MODEL, "http_port": 0, "drain_timeout_s": 0})
        router = Router(settings, ListedMembership(workers), {MODEL: model_directory})
        try:
            await router.start()
            await router.ready()
            yield Doors(f"http://{router.http_address}", router.grpc_address)
        finally:
            await router.stop()

    child.serve(pipe, service)
