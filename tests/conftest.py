"""What every test gets: one torch thread, a real Redis on demand, and a failure if it leaves anything behind."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from hypothesis import settings

from baton.cluster.redis_server import EmbeddedRedis

os.environ["OMP_NUM_THREADS"] = "1"  # before anybody imports torch: few cores, many processes

settings.load_profile("ci")  # the same examples in every run, however slow the machine

GRACE_S = 20.0
"""How long what a test has stopped may take to be gone."""
SHARED_MEMORY = Path("/dev/shm")
T = TypeVar("T")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """One real Redis for the session; tests keep apart by their key prefix and do not stop it."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def key_prefix(request: pytest.FixtureRequest) -> str:
    """A Redis key prefix of this test's own."""
    return f"test-{request.node.name}"


@pytest.fixture
def patient_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    """No restore is given up because the threads that do it have to wait for a processor."""
    for module in ("kvcache.restore_plan", "engine.restoring"):
        monkeypatch.setattr(f"{module}.GRACE_S", 30.0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the test that leaves a child process, a non-daemon thread or shared memory behind."""
    snapshots: tuple[Callable[[], set[str]], ...] = (child_processes, foreground_threads, shared_memory)
    before = set().union(*(snapshot() for snapshot in snapshots))
    yield
    deadline_s = time.monotonic() + GRACE_S
    while left := {name for name in set().union(*(snapshot() for snapshot in snapshots)) - before if is_ours(name)}:
        if time.monotonic() >= deadline_s:
            break
        time.sleep(0.05)
    if left:
        pytest.fail(f"left behind: {', '.join(sorted(left))}", pytrace=False)


@pytest.fixture(autouse=True)
def no_task_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`asyncio.run` cancels forgotten tasks without a word; in tests it names them and fails."""
    left: list[str] = []
    original = asyncio.run

    def run(main: Coroutine[Any, Any, T], **options: Any) -> T:
        async def watched() -> T:
            result = await main
            others = asyncio.all_tasks() - {asyncio.current_task()}
            pending = (await asyncio.wait(others, timeout=GRACE_S))[1] if others else set()
            left.extend(repr(task.get_coro()) for task in pending)
            return result

        return original(watched(), **options)

    monkeypatch.setattr(asyncio, "run", run)
    yield
    if left:
        pytest.fail(f"tasks left behind: {', '.join(left)}", pytrace=False)


def child_processes() -> set[str]:
    """Our children, and orphans of theirs that came to us. What a child keeps for itself is its own."""
    tracker = "multiprocessing.resource_tracker"  # Python's own, one for the whole run
    found = set()
    for child in psutil.Process().children():
        try:
            command = " ".join(child.cmdline())
            if tracker not in command and child.status() != psutil.STATUS_ZOMBIE:
                found.add(f"process {child.pid} ({command[:80]})")
        except psutil.NoSuchProcess:
            continue
    return found


def foreground_threads() -> set[str]:
    return {f"thread {thread.name}" for thread in threading.enumerate() if not thread.daemon}


def shared_memory() -> set[str]:
    return set(map(str, SHARED_MEMORY.iterdir())) if SHARED_MEMORY.is_dir() else set()


def is_ours(name: str) -> bool:
    """All but shared memory that is gone by now, or that somebody else has."""
    path = Path(name)
    return path.parent != SHARED_MEMORY or (path.exists() and not is_anothers(name))


def is_anothers(path: str) -> bool:
    """Whether a living process that is not of this run maps the file: a test run beside this one, say."""
    mine = psutil.Process()
    ours = {mine.pid, *(child.pid for child in mine.children(recursive=True))}
    for process in psutil.process_iter():
        try:
            if process.pid not in ours and any(path == region.path for region in process.memory_maps()):
                return True
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return False
