"""A real `baton up` in a process of its own, as tests see it."""

import contextlib
import json
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from engine.recall.text import Ledger, question

START_TIMEOUT_S = 280.0
"""A Ray and two workers: a quarter of a minute, or as many minutes as others leave of the processors."""
STOP_TIMEOUT_S = 200.0
LEFT_TIMEOUT_S = 60.0
POLL_S = 0.05
BATON = [sys.executable, "-m", "launcher"]


class RealUp:
    """Starts at once; `wait_ready` tells when it serves. `close` ends it whatever happened."""

    def __init__(self, *options: str) -> None:
        self._process = subprocess.Popen(
            [*BATON, "up", "--http-port", "0", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self.ready = self.url = ""
        self._footprint: tuple[list[psutil.Process], list[Path]] = ([], [])

    @property
    def stderr(self) -> str:
        return "".join(self._errors)

    @property
    def output_lines(self) -> list[str]:
        """What came on stdout and was not read yet."""
        lines = []
        while not self._lines.empty():
            if (line := self._lines.get_nowait()) is not None:
                lines.append(line)
        return lines

    def wait_ready(self) -> None:
        """From then on `ready` is its ready line."""
        line = self._lines.get(timeout=START_TIMEOUT_S)
        assert line is not None, f"it ended instead:\n{self.stderr}"
        self.ready, self.url = line, line.split()[1]
        self.look()

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def look(self) -> None:
        """Remembers its processes and temporary directories, for `left_behind`."""
        processes = self.descendants()
        directories = {Path(option.split("=")[1]) for one in processes for option in options_of(one)}
        directories |= {Path(one.cwd()) for one in processes if is_named(one, "redis-server")}
        self._footprint = (processes, sorted(directories))

    def left_behind(self, timeout_s: float = LEFT_TIMEOUT_S) -> list[str]:
        """What `look` saw and is still there after that time."""
        processes, directories = self._footprint
        _, alive = psutil.wait_procs(processes, timeout_s)
        return [*map(str, alive), *(str(directory) for directory in directories if directory.exists())]

    def sweep(self) -> None:
        """Removes what a killed one could not."""
        processes, directories = self._footprint
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait_end(self) -> int:
        return self._process.wait(STOP_TIMEOUT_S)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def workers(self) -> dict[str, dict[str, Any]]:
        """As `GET /v1/workers` tells, by id."""
        with urllib.request.urlopen(f"{self.url}/v1/workers", timeout=60) as reply:
            return {worker["worker_id"]: worker for worker in json.load(reply)["data"]}

    def ask(self, ledger: Ledger, locker: str) -> tuple[str, dict[str, Any]]:
        """The recall model's answer, and the request's timeline."""
        messages = [{"role": "system", "content": ledger.text}, {"role": "user", "content": question(locker)}]
        body = {"model": "recall", "messages": messages, "temperature": 0, "timeline": True}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            reply = json.load(response)
        return reply["choices"][0]["message"]["content"].strip().removesuffix("."), reply["timeline"]

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(self._process.stderr)


def options_of(process: psutil.Process) -> list[str]:
    try:
        return [option for option in process.cmdline() if option.startswith("--temp-dir=")]
    except psutil.NoSuchProcess:
        return []


def is_named(process: psutil.Process, *names: str) -> bool:
    """False of one that has ended meanwhile."""
    try:
        return process.name() in names
    except psutil.NoSuchProcess:
        return False


def listener_on(address: str, processes: list[psutil.Process]) -> psutil.Process:
    """The process that listens on HOST:PORT."""
    port = int(address.rpartition(":")[2])
    for process in processes:
        try:
            connections = process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        if any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections):
            return process
    raise AssertionError(f"nobody listens on {address}")


def wait_until(holds: Callable[[], bool], timeout_s: float = 200.0) -> None:
    """Other processes give no event to wait for."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(POLL_S)
