"""The workers that bench.handoff measures: `baton prefill-worker` and `baton decode-worker`, as they run anywhere."""

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.cluster.redis_server import find_executable
from bench.netns import SlowLink, slow_link

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.02
LOCALHOST = "127.0.0.1"


class StartFailed(Exception):
    """A process of the benchmark did not start."""


@dataclass(frozen=True, slots=True)
class Link:
    """What lies between prefill and decode workers."""

    name: str
    transport: str
    bits_per_s: int | None = None
    """Slowed down to so much, between two network namespaces; None: this machine's own."""


LINKS = (Link("shm", "shm"), Link("tcp", "tcp"), Link("tcp-1gbit", "tcp", 10**9))


@dataclass(frozen=True, slots=True)
class Cluster:
    """Addresses. Prefill workers by how they send, decode workers by what they verify."""

    prefill: Mapping[str, str]
    decode: Mapping[str, str]
    transport: str
    """That they are to use among each other."""


@contextmanager
def cluster(
    link: Link, model: Path, directory: Path, sends: Sequence[str], verifies: Sequence[str]
) -> Iterator[Cluster]:
    """A worker for each; they stop with the context. Raises NoNamespaces or StartFailed."""
    with ExitStack() as stack:
        slow = stack.enter_context(slow_link(link.bits_per_s)) if link.bits_per_s else None
        flags = [
            f"--redis-url={stack.enter_context(redis(directory))}",
            f"--model={model}",
            f"--transport={link.transport}",
            f"--cluster-secret-file={secret_file(directory)}",
            "--served-model-name=bench",
            "--kv-blocks=1024",
            "--threads=1",
            "--no-self-test",
            "--log-level=warning",
        ]
        near, far = (LOCALHOST, LOCALHOST) if slow is None else (slow.near_host, slow.far_host)
        here, there = [*flags, f"--host={near}"], [*flags, f"--host={far}"]
        prefill = {send: _worker(stack, "prefill-worker", [*there, f"--send={send}"], slow) for send in sends}
        decode = {
            verify: _worker(stack, "decode-worker", [*here, f"--verify={verify}", "--local-prefill-tokens-max=0"], None)
            for verify in verifies
        }
        yield Cluster(_addresses(prefill), _addresses(decode), link.transport)


@contextmanager
def redis(directory: Path) -> Iterator[str]:
    """A redis-server behind a Unix socket, which is reached from every network namespace; yields its URL."""
    path = directory / f"redis-{secrets.token_hex(4)}.sock"
    options = {"port": "0", "unixsocket": str(path), "unixsocketperm": "700", "save": "", "loglevel": "warning"}
    command = [find_executable(), *(word for name, value in options.items() for word in (f"--{name}", value))]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL) as process:
        try:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not path.exists():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise StartFailed("redis-server did not start")
                time.sleep(POLL_S)
            yield f"unix://{path}?db=0"
        finally:
            process.kill()


def secret_file(directory: Path) -> Path:
    path = directory / "cluster-secret"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


def _worker(stack: ExitStack, command: str, flags: Sequence[str], slow: SlowLink | None) -> "subprocess.Popen[str]":
    """Started, not ready yet: all of them load at the same time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    arguments = [*(slow.inside if slow else ()), sys.executable, "-m", "launcher", command, *flags]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
    stack.callback(_stop, process)
    return process


def _stop(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _addresses(processes: Mapping[str, "subprocess.Popen[str]"]) -> dict[str, str]:
    return {name: _ready_address(process) for name, process in processes.items()}


def _ready_address(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
    words = process.stdout.readline().split() if readable else []
    if words[:2] != ["ready", "grpc"]:
        raise StartFailed("a worker did not start; what it said is above")
    return words[2]
