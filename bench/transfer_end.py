"""One end of a transfer: a process that does what it is told, a line of JSON each way. Standard library alone."""

import asyncio
import inspect
import json
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.transfer_plan import TAIL_BYTES, Form

PROJECT = Path(__file__).parents[1]
ANSWER_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
REPEATS_MAX = 200
"""Of one total, however small."""
Handlers = Mapping[str, Callable[..., Any]]


class EndFailed(Exception):
    """An end could not do what it was asked to; the message says why."""


class End:
    """The parent's side of the process; a context manager."""

    def __init__(self, python: Path, module: str, *arguments: object) -> None:
        self._command = [str(python), "-m", module, *map(str, arguments)]

    def __enter__(self) -> "End":
        self._link, theirs = socket.socketpair()
        environment = os.environ | {"NIXL_LOG_LEVEL": "ERROR"}
        with theirs:  # its standard input, both ways; what libraries print to its output goes where errors go
            self._process = subprocess.Popen(
                self._command, cwd=PROJECT, env=environment, stdin=theirs.fileno(), stdout=2
            )
        self._link.settimeout(ANSWER_TIMEOUT_S)
        self._lines = self._link.makefile("rw", newline="\n")
        return self

    def __exit__(self, *_: object) -> None:
        """The link ends, and with it the process."""
        with suppress(OSError):  # what is left to be flushed, where the process is gone
            self._lines.close()
        self._link.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # whatever it measured has been told
            self._process.wait()

    def ask(self, what: str, **arguments: Any) -> Any:
        try:
            print(json.dumps({"what": what, **arguments}), file=self._lines, flush=True)
            line = self._lines.readline()
        except TimeoutError:
            raise EndFailed(f"its process did not answer to {what!r} within {ANSWER_TIMEOUT_S:g} s") from None
        except OSError:
            line = ""
        if not line:
            raise EndFailed(f"its process ended instead of answering to {what!r}")
        answer = json.loads(line)
        if "error" in answer:
            raise EndFailed(answer["error"])
        return answer["result"]


# ---- in the process


async def answer(handlers: Handlers, failures: tuple[type[Exception], ...] = ()) -> None:
    """Until the parent ends the link. `failures` are told; what else is raised ends the process."""
    answers = os.fdopen(os.dup(0), "w")
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        try:
            result = handlers[command.pop("what")](**command)
            told = {"result": await result if inspect.isawaitable(result) else result}
        except failures as error:
            told = {"error": str(error)}
        print(json.dumps(told), file=answers, flush=True)


async def repeat(act: Callable[[], Awaitable[None]], at_least_s: float, at_least: int) -> dict[str, Any]:
    """Over and over, for so long and so many times at least: the seconds of each, and this process's CPU seconds of
    all together."""
    each_s: list[float] = []
    cpu_s = time.process_time()
    while len(each_s) < at_least or (sum(each_s) < at_least_s and len(each_s) < REPEATS_MAX):
        start_s = time.perf_counter()
        await act()
        each_s.append(time.perf_counter() - start_s)
    return {"each_s": each_s, "cpu_s": time.process_time() - cpu_s}


def fill(memory: memoryview, slice_bytes: int) -> None:
    """With bytes that differ from slice to slice, at their ends at least."""
    noise = os.urandom(slice_bytes)
    for index, start in enumerate(range(0, len(memory), slice_bytes)):
        memory[start : start + slice_bytes] = noise
        memory[start + slice_bytes - 8 : start + slice_bytes] = index.to_bytes(8, "little")


def tails_checksum(slices: Iterable[memoryview]) -> int:
    checksum = 0
    for each in slices:
        checksum = zlib.crc32(each[-TAIL_BYTES:], checksum)
    return checksum


def flat_slices(memory: memoryview, form: Form) -> Iterable[memoryview]:
    """Of memory where they lie one after the other."""
    return (memory[i * form.slice_bytes : (i + 1) * form.slice_bytes] for i in range(form.slices))
