"""Baton's processes by hand, as a chart's pods start them: `baton router`, `prefill-worker`, `decode-worker`."""

import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATON = str(Path(sys.executable).with_name("baton"))
START_TIMEOUT_S = 200
PATIENCE_S = 60.0
"""For what takes a second or so where the processors are not shared with others."""


@dataclass
class Process:
    popen: "subprocess.Popen[str]"
    ready: str
    """Its ready line."""

    @property
    def http(self) -> str:
        match = re.search(r"http://\S+", self.ready)
        assert match
        return match.group()

    @property
    def grpc(self) -> str:
        match = re.search(r"grpc (\S+)", self.ready)
        assert match
        return match.group(1)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


@contextmanager
def running(command: str, **flags: Any) -> Iterator[Process]:
    """From the ready line until the end of the block; then SIGTERM, on which it must exit with 0."""
    arguments = [argument(name.replace("_", "-"), value) for name, value in flags.items()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    with subprocess.Popen([BATON, command, *arguments], stdout=subprocess.PIPE, text=True, env=environment) as popen:
        try:
            assert popen.stdout
            readable, _, _ = select.select([popen.stdout], [], [], START_TIMEOUT_S)
            ready = popen.stdout.readline() if readable else ""
            assert ready.startswith("ready "), f"baton {command} did not start: {ready!r}, exit {popen.poll()}"
            yield Process(popen, ready.strip())
            if popen.poll() is None:
                popen.send_signal(signal.SIGTERM)
                assert popen.wait(PATIENCE_S) == 0
        finally:
            popen.kill()


def argument(name: str, value: Any) -> str:
    return f"--{name}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{name}"


def fetch(url: str, body: Any = None, timeout_s: float = 120) -> Any:
    """GET, or POST of JSON; the answer is JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return json.loads(response.read())


def metric(port: int, pattern: str) -> float:
    """The sum of the samples whose name and labels match."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(pattern, line))


def free_port() -> int:
    """A port that nobody has, and that the system gives to nobody who asks for any before it is taken."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for port in random.sample([*range(10_000, first), *range(last + 1, 65_536)], 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def until(holds: Any, within_s: float, what: str) -> None:
    """Polls until it holds."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what}"
        time.sleep(0.02)
