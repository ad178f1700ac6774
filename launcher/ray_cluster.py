"""Ray as Baton uses it: a quiet local one that leaves nothing behind, or one that runs already."""

import asyncio
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from baton.cluster.worker_info import Role
from baton.errors import BatonError, ClusterError, SettingsError
from launcher.log_stream import LogStream
from launcher.worker_actor import StartOutcome, WorkerActor

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 * 2**20
"""About the least that Ray takes: no data of Baton's goes through it."""
CALLS_MAX = 8
"""Calls to one worker's actor at a time."""
CONNECT_TIMEOUT_S = 3.0
LOOPBACK = "127.0.0.1"
LOCAL_HOSTS = frozenset({"auto", "local", "localhost", LOOPBACK})
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to run: its role, its settings, and what Ray should give it."""

    name: str
    role: Role
    settings: Mapping[str, Any] = field(repr=False)  # the Redis URL holds a password
    gpus: float
    environment: Mapping[str, str]


class WorkerLost(BatonError):
    """The process that ran a worker is gone, or Ray is."""


class RayWorker:
    """A worker's actor, across all its lives. Every method raises WorkerLost when the present life ends."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name, self._actor = name, actor

    async def outcome(self) -> StartOutcome:
        """Waits until this life's worker serves or has failed to."""
        outcome: StartOutcome = await self._call("outcome")
        return outcome

    async def until_death(self) -> None:
        await self._call("until_death")

    async def drain(self) -> None:
        await self._call("drain")

    async def stop(self) -> None:
        await self._call("stop")

    def kill(self) -> None:
        """Ends this life; Ray begins the next one."""
        import ray

        ray.kill(self._actor, no_restart=False)

    async def _call(self, method: str) -> Any:
        from ray.exceptions import RayError

        try:
            return await asyncio.wrap_future(getattr(self._actor, method).remote().future())
        except RayError as error:
            raise WorkerLost(f"{self.name} was lost ({type(error).__name__}).") from error


class RayCluster:
    """Starts Ray, or connects to it, and places workers there.

    Ray's processes die with the *thread* that started them, so one thread starts it and stays until `stop`.
    """

    def __init__(self, address: str | None, *, is_debugging: bool) -> None:
        self._address, self._is_debugging = address, is_debugging
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")
        self._environment = dict[str, str | None]()
        self._directory: str | None = None
        self._stdout = sys.stdout

    @property
    def is_own(self) -> bool:
        """Whether Ray was started here, for this process alone."""
        return self._address is None

    async def start(self) -> None:
        """Raises ClusterError or SettingsError if there is no Ray to be had."""
        await self._on_thread(self._start_own if self._address is None else self._connect)
        take_signals_back()

    async def stop(self) -> None:
        """Idempotent: no process and no file of our Ray is left."""
        await self._on_thread(lambda: None)  # after a start that nobody waits for any more
        take_signals_back()
        await self._on_thread(self._stop)
        self._thread.shutdown()

    async def place(self, plan: WorkerPlan) -> RayWorker:
        """Returns at once; `outcome` tells how the start went."""
        return RayWorker(plan.name, await self._on_thread(functools.partial(self._make_actor, plan)))

    async def _on_thread(self, act: Callable[[], Result]) -> Result:
        """Shielded: whoever waits may be cancelled, but a half-made Ray could not be taken down."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, act))

    def _start_own(self) -> None:
        self._set_environment(
            RAY_USAGE_STATS_ENABLED="0",
            RAY_DEDUP_LOGS="0",
            RAY_COLOR_PREFIX="0",
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN=secrets.token_hex(32),  # else Ray keeps one in the home directory
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # a worker that reserves no GPU still sees them
        )
        self._directory = tempfile.mkdtemp(prefix="baton-", dir="/tmp")  # socket paths there may have 107 bytes
        self._init(
            address="local",
            _temp_dir=self._directory,
            _node_ip_address=LOOPBACK,
            include_dashboard=False,
            num_cpus=1,
            object_store_memory=OBJECT_STORE_BYTES,
        )

    def _connect(self) -> None:
        check_ray_address(str(self._address))
        self._init(address=self._address)

    def _init(self, **arguments: Any) -> None:
        import ray

        level = logging.DEBUG if self._is_debugging else logging.ERROR
        sys.stdout = LogStream(logging.getLogger("ray.messages"))  # Ray prints what befalls its processes
        try:
            ray.init(log_to_driver=True, logging_level=level, namespace="baton", **arguments)
        except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
            log.debug("Ray's own words", exc_info=True)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ClusterError(f"Ray could not be started or reached: {reason[0].rstrip('.')}.") from None

    def _make_actor(self, plan: WorkerPlan) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(WorkerActor).options(
            name=None,
            max_restarts=-1,
            max_concurrency=CALLS_MAX,
            num_cpus=0 if self.is_own else 1,
            num_gpus=plan.gpus,
            runtime_env={"env_vars": dict(plan.environment)},
            scheduling_strategy=here if is_local(self._address) else "SPREAD",
        )
        return actor.remote(plan.role, dict(plan.settings), is_elsewhere=not is_local(self._address))

    def _stop(self) -> None:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        sys.stdout = self._stdout
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        self._restore_environment()

    def _set_environment(self, **variables: str) -> None:
        """Ray's processes read these; ours does not, and gets its own back at the end."""
        self._environment = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)

    def _restore_environment(self) -> None:
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment.clear()


def take_signals_back() -> None:
    """Ray's core takes SIGTERM for a crash: it prints a stack, and aborts the process three seconds later."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.getsignal(number))
    signal.alarm(0)


def is_local(address: str | None) -> bool:
    """Whether that Ray is on this machine, so that the workers can be, too."""
    return address is None or address.rpartition(":")[0] in LOCAL_HOSTS or address in LOCAL_HOSTS


def check_ray_address(address: str) -> None:
    """Raises SettingsError or ClusterError within seconds, where Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise SettingsError(f"{address} is not a Ray cluster's address: it should be HOST:PORT, or auto.")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"No Ray cluster can be reached at {address}: {error.strerror or error}.") from None
