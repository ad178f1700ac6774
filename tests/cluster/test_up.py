"""`baton up` with real processes: Redis, Ray, two workers and the router."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.recall.text import make_ledger
from tests.cluster.real_up import BATON, START_TIMEOUT_S, RealUp, is_named, listener_on, wait_until

RAY_AGENTS = ("dashboard/agent.py", "runtime_env/agent/main.py")
"""Their programs. When Ray was killed these try for a minute to tell somebody, before they go."""
RAY_AGENT_NAMES = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""As they call themselves, once they have come so far."""
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def up() -> Iterator[RealUp]:
    """One for all tests up to the one that ends it."""
    real = RealUp("--no-self-test")  # all think themselves equally fast, so prompts are computed apart
    try:
        real.wait_ready()
        yield real
    finally:
        real.close()


def test_it_says_that_it_is_ready_in_one_line(up: RealUp) -> None:
    line = up.ready.split()
    assert line[0] == "ready" and line[1].startswith("http://127.0.0.1:")
    assert line[2] == "grpc" and line[3].startswith("127.0.0.1:")
    assert up.output_lines == []


def test_it_answers_a_long_prompt_right_over_streamed_blocks(up: RealUp) -> None:
    ledger = make_ledger(100, seed=1)
    locker = next(iter(ledger.owners))
    answer, timeline = up.ask(ledger, locker)
    assert answer == ledger.owner(locker)
    assert timeline["transport"] == "shm" and timeline["transfer_bytes"] > 0
    assert (timeline["prefill_worker"], timeline["decode_worker"]) == ("prefill-0", "decode-0")


def test_status_shows_its_workers(up: RealUp) -> None:
    told = subprocess.run([*BATON, "status", "--url", up.url, "--json"], capture_output=True, text=True, check=True)
    workers = json.loads(told.stdout)["workers"]
    assert [(worker["worker_id"], worker["state"]) for worker in workers] == [
        ("decode-0", "ready"),
        ("prefill-0", "ready"),
    ]
    table = subprocess.run([*BATON, "status", "--url", up.url], capture_output=True, text=True, check=True).stdout
    assert "prefill-0" in table and "recall" in table


@pytest.mark.parametrize("worker_id", ["decode-0", "prefill-0"])
def test_a_killed_worker_comes_back_and_the_next_request_is_right(up: RealUp, worker_id: str) -> None:
    before = up.workers()[worker_id]["address"]
    listener_on(before, up.descendants()).kill()

    def is_back() -> bool:
        worker = up.workers().get(worker_id)
        return worker is not None and worker["address"] != before and worker["state"] == "ready"

    wait_until(is_back)
    ledger = make_ledger(60, seed=2)
    locker = list(ledger.owners)[30]
    wait_until(lambda: up.ask(ledger, locker)[0] == ledger.owner(locker))
    up.look()


def test_when_redis_is_killed_serving_goes_on(up: RealUp) -> None:
    (redis,) = (one for one in up.descendants() if is_named(one, "redis-server"))
    redis.kill()
    ledger = make_ledger(20, seed=3)
    locker = list(ledger.owners)[10]
    assert up.ask(ledger, locker)[0] == ledger.owner(locker)
    wait_until(lambda: any(is_named(one, "redis-server") and one != redis for one in up.descendants()))
    assert set(up.workers()) == {"decode-0", "prefill-0"}
    assert up.ask(ledger, locker)[0] == ledger.owner(locker)
    up.look()


def test_sigterm_ends_it_and_leaves_nothing_behind(up: RealUp) -> None:
    up.send(signal.SIGTERM)
    assert up.wait_end() == 0
    assert up.left_behind() == []
    assert up.output_lines == []
    assert "Traceback" not in up.stderr and "SIGTERM" not in up.stderr


def test_sigint_while_it_starts_leaves_nothing_behind() -> None:
    real = RealUp()
    try:
        wait_until(lambda: any(is_named(one, "raylet") for one in real.descendants()))
        real.look()
        real.send(signal.SIGINT)
        assert real.wait_end() == 0
        assert real.left_behind() == []
        assert real.output_lines == []
    finally:
        real.close()


def is_ray_agent(process: psutil.Process) -> bool:
    if is_named(process, *RAY_AGENT_NAMES):
        return True
    try:
        return any(argument.endswith(RAY_AGENTS) for argument in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_its_children_go_when_it_is_killed() -> None:
    real = RealUp()
    try:
        real.wait_ready()
        children = [one for one in real.descendants() if not is_ray_agent(one)]
        real.send(signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=45)
        assert alive == []
    finally:
        real.close()
        real.sweep()


def test_a_model_that_cannot_be_loaded_ends_it_with_the_workers_own_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "model.safetensors").touch()
    real = RealUp("--model", str(tmp_path))
    try:
        assert real.wait_end() == 1
        assert real.output_lines == []
    finally:
        real.close()
    (error,) = (line for line in real.stderr.splitlines() if line.startswith("error:"))
    assert "could not start" in error and "mamba" in error


def test_the_demo_is_right() -> None:
    demo = subprocess.run([*BATON, "demo", "--json"], capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert demo.returncode == 0, demo.stderr
    told = json.loads(demo.stdout)
    assert told["is_success"] and len(told["answers"]) == 5
    assert any(answer["timeline"]["transport"] for answer in told["answers"])
