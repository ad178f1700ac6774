"""What `baton up` will run, decided from its settings before anything is started."""

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from baton.cluster.worker_info import Role
from baton.errors import SettingsError
from baton.settings import DecodeWorkerSettings, PrefillWorkerSettings, ServiceSettings, UpSettings, WorkerSettings
from launcher.checks import check_port
from launcher.ray_cluster import LOOPBACK, WorkerPlan, check_ray_address, is_local

BY_HAND_ONLY = frozenset({"worker_id", "transport_port", "metrics_port"})
"""Settings that two workers cannot share: `baton up` chooses them itself."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
KINDS: dict[Role, type[WorkerSettings]] = {"prefill": PrefillWorkerSettings, "decode": DecodeWorkerSettings}
Settings = TypeVar("Settings", bound=ServiceSettings)


def check_settings(settings: UpSettings) -> None:
    """Raises SettingsError or ClusterError, within seconds, for what cannot work."""
    for name in sorted(BY_HAND_ONLY & settings.model_fields_set):
        raise SettingsError(f"{name} cannot be set for `baton up`, whose workers each need their own.")
    if settings.model_name not in {model.name for model in settings.served_models}:
        raise SettingsError(f"models must name {settings.model_name!r} too, which the workers of `baton up` serve.")
    if settings.ray_address is not None:
        if not is_local(settings.ray_address) and settings.redis_url is None:
            raise SettingsError("Workers on several machines need a Redis that all can reach: name it with --redis.")
        check_ray_address(settings.ray_address)
    check_port(settings.host, settings.http_port, "--http-port")
    check_port(settings.host, settings.grpc_port, "--grpc-port")
    if settings.http_port == settings.grpc_port != 0:
        raise SettingsError(f"HTTP and gRPC cannot share port {settings.http_port}; choose another --grpc-port.")


def plan_workers(settings: UpSettings, redis_url: str, run_id: str, cores: int | None = None) -> Sequence[WorkerPlan]:
    """The workers, prefill first. With a Redis that others may use too, their names carry the run's id."""
    roles: list[Role] = ["prefill" for _ in range(settings.prefill)]
    roles += ["decode" for _ in range(settings.decode)]
    suffix = "" if settings.redis_url is None else f"-{run_id}"
    names = [f"{role}-{roles[:index].count(role)}{suffix}" for index, role in enumerate(roles)]
    threads = threads_each(settings, len(roles), cores or len(os.sched_getaffinity(0)))
    environment = dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {}
    return [
        WorkerPlan(
            name,
            role,
            worker_fields(settings, role, redis_url=redis_url, worker_id=name, threads=threads),
            settings.gpus_per_worker,
            environment,
        )
        for name, role in zip(names, roles, strict=True)
    ]


def threads_each(settings: UpSettings, workers: int, cores: int) -> int:
    """The cores shared between the workers, where all of them share this machine; 0: each library's own choice."""
    return settings.threads or (max(1, cores // workers) if is_local(settings.ray_address) else 0)


def worker_fields(settings: UpSettings, role: Role, **own: Any) -> dict[str, Any]:
    """On other machines of a Ray cluster, the actor replaces the host by its machine's address."""
    own |= {"grpc_port": 0, "transport_port": 0, "metrics_port": None, "advertise_host": None, "host": LOOPBACK}
    return settings_for(KINDS[role], settings, **own).model_dump()


def settings_for(kind: type[Settings], settings: UpSettings, **own: Any) -> Settings:
    """One service's part of the settings, with some values of its own."""
    return kind(**(settings.model_dump(include=set(kind.model_fields)) | own))
