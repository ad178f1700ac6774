"""A worker inside a Ray actor: the same object that `baton prefill-worker` and `baton decode-worker` run."""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from baton.cluster.worker_info import Role
from baton.errors import BatonError
from baton.logs import set_up_logging
from launcher.process import Service

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 20.0


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


class WorkerActor:
    """Starts its worker when it is made, on an asyncio thread of its own; so does every life that Ray gives
    it after a death. It is a threaded actor: `outcome` and `until_death` block while other calls go on.
    """

    def __init__(self, role: Role, settings: dict[str, Any], *, is_elsewhere: bool) -> None:
        """`is_elsewhere`: perhaps on another machine, so it must be reached by this machine's address."""
        set_up_logging(f"{role}-worker", settings["log_level"])
        if is_elsewhere:
            settings |= addresses_of_this_machine()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="worker", daemon=True).start()
        self._started = asyncio.run_coroutine_threadsafe(self._start(role, settings), self._loop)

    def outcome(self) -> StartOutcome:
        """Blocks until the worker serves or has failed to."""
        return self._started.result()

    def until_death(self) -> None:
        """Never returns: the call breaks when this process dies, and that tells."""
        threading.Event().wait()

    def drain(self) -> None:
        self._run(self._worker.drain(), None)

    def stop(self) -> None:
        self._run(self._worker.stop(), STOP_TIMEOUT_S)

    async def _start(self, role: Role, settings: dict[str, Any]) -> StartOutcome:
        try:
            self._worker = make_worker(role, settings)
            await self._worker.start()
        except BatonError as error:
            return StartOutcome(failure=str(error))
        except Exception as error:  # a bug, which only this process can tell about
            log.exception("the worker could not start")
            return StartOutcome(failure=f"An internal error ({type(error).__name__}: {error}) ended its start.")
        return StartOutcome(address=self._worker.address)

    def _run(self, work: Coroutine[Any, Any, None], timeout_s: float | None) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)


def make_worker(role: Role, settings: dict[str, Any]) -> Worker:
    """Imports torch, so only where the worker is to run."""
    if role == "prefill":
        from baton.settings import PrefillWorkerSettings
        from prefill_worker.worker import PrefillWorker

        return PrefillWorker(PrefillWorkerSettings(**settings))
    from baton.settings import DecodeWorkerSettings
    from decode_worker.worker import DecodeWorker

    return DecodeWorker(DecodeWorkerSettings(**settings))


def addresses_of_this_machine() -> dict[str, Any]:
    import ray

    address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    return {"host": address, "advertise_host": address}
