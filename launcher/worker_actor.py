"""A worker inside a Ray actor: the same object that `baton prefill-worker` and `baton decode-worker` run."""

import asyncio
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from baton.cluster.worker_info import Role
from baton.errors import BatonError
from baton.logs import set_up_logging
from baton.process import freeze_heap, raise_descriptor_limit
from launcher.process import Service

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0
PR_SET_PDEATHSIG = 1


class Worker(Service, Protocol):
    @property
    def address(self) -> str:
        """HOST:PORT of its gRPC server, once started."""
        ...


@dataclass(frozen=True, slots=True)
class StartOutcome:
    """How a worker's start went: with an address, or with a sentence that says why not."""

    address: str = ""
    failure: str = ""


Started = tuple[Worker | None, StartOutcome]


class WorkerActor:
    """Starts its worker when it is made, on an asyncio thread of its own; so does every life that Ray gives
    it after a death. `outcome` and `until_death` block while other calls go on: Ray runs each call on a
    thread, as long as no method here is `async`.
    """

    def __init__(self, role: Role, settings: dict[str, Any], *, is_elsewhere: bool) -> None:
        """`is_elsewhere`: perhaps on another machine, so it must be reached by that machine's address."""
        die_with_parent()
        raise_descriptor_limit()
        set_up_logging(f"{role}-worker", settings["log_level"])
        if is_elsewhere:
            settings |= addresses_of_this_machine()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="worker", daemon=True).start()
        self._started = asyncio.run_coroutine_threadsafe(start(role, settings), self._loop)
        self._watch = asyncio.run_coroutine_threadsafe(die_when_failed(self._started), self._loop)

    def outcome(self) -> StartOutcome:
        """Blocks until the worker serves or has failed to."""
        _, outcome = self._started.result()
        return outcome

    def until_death(self) -> None:
        """Never returns: the call breaks when this process dies, and that tells."""
        threading.Event().wait()

    def drain(self) -> None:
        self._run(lambda worker: worker.drain(), None)

    def stop(self) -> None:
        self._run(lambda worker: worker.stop(), STOP_TIMEOUT_S)

    def _run(self, method: Callable[[Worker], Coroutine[Any, Any, None]], timeout_s: float | None) -> None:
        worker, _ = self._started.result()
        if worker is not None:
            asyncio.run_coroutine_threadsafe(method(worker), self._loop).result(timeout_s)


async def start(role: Role, settings: dict[str, Any]) -> "Started":
    try:
        worker = make_worker(role, settings)
        await worker.start()
        freeze_heap()
    except BatonError as error:
        return None, StartOutcome(failure=str(error))
    except Exception as error:  # a bug, which only this process can tell about
        log.exception("the worker could not start")
        return None, StartOutcome(failure=f"An internal error ({type(error).__name__}: {error}) ended its start.")
    return worker, StartOutcome(address=worker.address)


async def die_when_failed(started: "Future[Started]") -> None:
    """Ray begins the next life."""
    worker, _ = await asyncio.wrap_future(started)
    try:
        if worker is not None:
            await worker.failed()
    except Exception:
        log.critical("the worker cannot go on; its process ends", exc_info=True)
        os._exit(1)


def make_worker(role: Role, settings: dict[str, Any]) -> Worker:
    """Imports torch, so only where the worker is to run."""
    if role == "prefill":
        from baton.settings import PrefillWorkerSettings
        from prefill_worker.worker import PrefillWorker

        return PrefillWorker(PrefillWorkerSettings(**settings))
    from baton.settings import DecodeWorkerSettings
    from decode_worker.worker import DecodeWorker

    return DecodeWorker(DecodeWorkerSettings(**settings))


def die_with_parent() -> None:
    """When Ray is killed its workers go at once, with their ports and memory; Ray alone takes half a minute."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def addresses_of_this_machine() -> dict[str, Any]:
    import ray

    address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    return {"host": address, "advertise_host": address}
