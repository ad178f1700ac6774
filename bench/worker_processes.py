"""Workers as they run anywhere: `baton prefill-worker` and `baton decode-worker`, with a Redis of their own."""

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from baton.cluster.redis_server import find_executable

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.02
Process = subprocess.Popen[str]


class StartFailed(Exception):
    """A process of the benchmark did not start."""


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


def start_worker(stack: ExitStack, command: str, flags: Sequence[str], inside: Sequence[str] = ()) -> Process:
    """Started, not ready yet, so that several load at the same time; it stops with the stack. `inside` goes before the
    command."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    arguments = [*inside, sys.executable, "-m", "launcher", command, *flags]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
    stack.callback(_stop, process)
    return process


def ready_address(process: Process) -> str:
    """Of its gRPC server, when it serves. Raises StartFailed."""
    words = _ready_words(process)
    return words[words.index("grpc") + 1]


def ready_url(process: Process) -> str:
    """Of a router. Raises StartFailed."""
    words = _ready_words(process)
    return next(word for word in words if word.startswith("http://"))


def _ready_words(process: Process) -> list[str]:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
    words = process.stdout.readline().split() if readable else []
    if words[:1] != ["ready"]:
        raise StartFailed("a process did not start; what it said is above")
    return words


def _stop(process: Process) -> None:
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
