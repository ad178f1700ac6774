import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ClusterError, SettingsError
from baton.secret import cluster_secret, with_secret
from baton.settings import DecodeWorkerSettings, PrefillWorkerSettings, RouterSettings, UpSettings, load_settings
from launcher.plan import KINDS, check_settings, plan_workers, settings_for, threads_each
from launcher.ray_cluster import is_local

REDIS = "redis://:secret@127.0.0.1:1/0"


def up(**fields: Any) -> UpSettings:
    return UpSettings(**{"http_port": 0, **fields})


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        yield squatter.getsockname()[1]


def test_workers_get_names_roles_and_ports_of_their_own() -> None:
    plans = plan_workers(up(prefill=1, decode=2, grpc_port=5000), REDIS, "run", cores=4)
    assert [(plan.name, plan.role) for plan in plans] == [
        ("prefill-0", "prefill"),
        ("decode-0", "decode"),
        ("decode-1", "decode"),
    ]
    assert all(plan.settings["grpc_port"] == 0 and plan.settings["redis_url"] == REDIS for plan in plans)
    assert [plan.settings["worker_id"] for plan in plans] == [plan.name for plan in plans]


def test_what_is_planned_is_what_the_worker_takes() -> None:
    prefill, decode = plan_workers(up(kv_blocks=7, local_prefill_tokens_max=9), REDIS, "run", cores=4)
    assert PrefillWorkerSettings(**prefill.settings).kv_blocks == 7
    assert DecodeWorkerSettings(**decode.settings).local_prefill_tokens_max == 9


def test_workers_get_the_tiers_that_are_asked_for() -> None:
    tiers = {"ddr_bytes": "2GiB", "ssd_dir": "/var/cache/baton", "ssd_bytes": "8GiB", "kv_compression": "int8"}
    for plan in plan_workers(up(**tiers, fetch=False), REDIS, "run", cores=4):
        settings = KINDS[plan.role](**plan.settings)
        assert (settings.ddr_bytes, settings.ssd_bytes) == (2 * 2**30, 8 * 2**30)
        assert (settings.ssd_dir, settings.kv_compression, settings.fetch) == (Path("/var/cache/baton"), "int8", False)


def test_a_plan_does_not_show_the_password() -> None:
    assert "secret" not in repr(plan_workers(up(), REDIS, "run", cores=4))


def test_on_a_redis_that_others_use_names_carry_the_run() -> None:
    plans = plan_workers(up(redis_url=REDIS), REDIS, "run", cores=4)
    assert [plan.name for plan in plans] == ["prefill-0-run", "decode-0-run"]


@pytest.mark.parametrize(
    ("fields", "workers", "cores", "threads"),
    [({}, 2, 8, 4), ({}, 3, 2, 1), ({"threads": 5}, 2, 8, 5), ({"ray_address": "10.0.0.1:6379"}, 2, 8, 0)],
)
def test_cores_are_shared_between_the_workers_of_one_machine(
    fields: dict[str, Any], workers: int, cores: int, threads: int
) -> None:
    assert threads_each(up(**fields), workers, cores) == threads


def test_threads_reach_the_libraries_before_they_load() -> None:
    (plan,) = plan_workers(up(prefill=0, threads=3), REDIS, "run")
    assert set(plan.environment.values()) == {"3"} and "OMP_NUM_THREADS" in plan.environment


def test_the_router_keeps_its_own_part() -> None:
    router = settings_for(RouterSettings, up(grpc_port=5, requests_max=6), redis_url=REDIS)
    assert (router.grpc_port, router.requests_max, router.redis_url) == (5, 6, REDIS)


def test_sound_settings_pass() -> None:
    check_settings(up())


@pytest.mark.parametrize("flag", ["http_port", "grpc_port"])
def test_a_taken_port_is_told(taken_port: int, flag: str) -> None:
    with pytest.raises(SettingsError, match=f"Port {taken_port} .*--{flag.replace('_', '-')}"):
        check_settings(up(**{flag: taken_port}))


@pytest.mark.parametrize("name", ["worker_id", "transport_port", "metrics_port"])
def test_what_workers_cannot_share_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        check_settings(up(**{name: "1"}))


def test_http_and_grpc_cannot_share_a_port() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(SettingsError, match="cannot share"):
        check_settings(up(http_port=port, grpc_port=port))


def test_several_machines_need_a_redis_that_all_can_reach() -> None:
    with pytest.raises(SettingsError, match="--redis"):
        check_settings(up(ray_address="10.0.0.1:6379"))


@pytest.mark.parametrize("address", ["ray://h:1", "h", "h:port", ":1"])
def test_what_is_no_ray_address_is_told(address: str) -> None:
    with pytest.raises(SettingsError, match="not a Ray cluster's address"):
        check_settings(up(ray_address=address, redis_url=REDIS))


def test_a_ray_cluster_that_is_not_there_is_told(taken_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    with pytest.raises(ClusterError, match="No Ray cluster"):
        check_settings(up(ray_address=f"127.0.0.1:{free}"))
    check_settings(up(ray_address=f"127.0.0.1:{taken_port}"))


@pytest.mark.parametrize(
    ("address", "local"),
    [(None, True), ("auto", True), ("127.0.0.1:6379", True), ("localhost:1", True), ("10.0.0.1:6379", False)],
)
def test_is_local(address: str | None, local: bool) -> None:
    assert is_local(address) == local


def test_only_the_router_listens_to_the_world() -> None:
    settings = up(host="0.0.0.0")
    plans = plan_workers(settings, REDIS, "run")
    assert {plan.settings["host"] for plan in plans} == {"127.0.0.1"}
    assert settings_for(RouterSettings, settings, redis_url=REDIS).host == "0.0.0.0"


def test_a_worker_by_hand_must_say_how_others_reach_it() -> None:
    with pytest.raises(SettingsError, match=r"cannot be used: others cannot reach .* set advertise_host\.$"):
        load_settings(DecodeWorkerSettings, {"host": "0.0.0.0"})
    assert load_settings(DecodeWorkerSettings, {"host": "0.0.0.0", "advertise_host": "10.0.0.3"})


def test_all_workers_get_one_secret_that_nothing_shows() -> None:
    settings = with_secret(up())
    plans = plan_workers(settings, REDIS, "run")
    secrets = {cluster_secret(KINDS[plan.role](**plan.settings)) for plan in plans}
    assert len(secrets) == 1 and (secret := secrets.pop()) is not None
    assert secret.decode() not in f"{plans!r} {[dict(plan.settings) for plan in plans]!r} {settings!r}"
