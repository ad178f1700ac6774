"""Kills processes with SIGKILL at chosen points of what they do to the disk.

A *scenario* is a function at the top of a module, `scenario(directory, seed, calls, done)`: it does what follows from
its seed, in the directory, through `calls`, and says `done(n)` when its n-th step is complete. For each seed it is
run twice, each time in a new process: once to its end, to count its calls, and once to be killed at one of them,
which the seed chooses, with a part of the buffers written. What it had handed to the kernel until then stays.

The processes are forked by one small process with a single thread (this file as a script): a fork of the process that
runs the tests would take along whatever locks its threads hold.
"""

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NoReturn

from kvcache.tiers.disk.disk_calls import Buffers, DiskCalls, zero
from kvcache.tiers.disk.slot_format import HEADER_BYTES
from kvcache.tiers.pages import PAGE_BYTES

Done = Callable[[int], None]
Scenario = Callable[[Path, int, DiskCalls, Done], None]


@dataclass(frozen=True)
class Killed:
    """One process that was, and what it left."""

    seed: int
    directory: Path
    call: int
    """Which of its calls it was killed in, from 1 on."""
    done: int
    """The highest n of its `done`; 0: none."""


def killed_at_seeded_points(
    scenario: Scenario, root: Path, seeds: Iterable[int], timeout_s: float = 120.0
) -> list[Killed]:
    """One for each seed, each in a directory of its own below `root`."""
    arguments = [inspect.getfile(scenario), scenario.__name__, str(root), *map(str, seeds)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    output = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, check=True, timeout=timeout_s, stdout=subprocess.PIPE
    ).stdout
    return [
        Killed(found["seed"], Path(found["directory"]), found["call"], found["done"]) for found in json.loads(output)
    ]


class CountedCalls:
    """The real calls, counted; in the `fatal` one (0: none) the process dies."""

    def __init__(self, fatal: int, seed: int) -> None:
        self.count, self._fatal, self._random = 0, fatal, Random(seed)
        self.calls = DiskCalls(os.preadv, self._pwritev, self._allocate, self._zero, self._truncate)

    def _pwritev(self, file: int, buffers: Buffers, offset: int) -> int:
        if self._is_fatal():
            self._write_part(file, b"".join(buffers), offset)
            _die()
        return os.pwritev(file, buffers, offset)

    def _write_part(self, file: int, data: bytes, offset: int) -> None:
        """Past direct I/O's rules: not even sectors are whole."""
        cut = self._random.choice((0, HEADER_BYTES // 2, HEADER_BYTES, PAGE_BYTES, *[len(data)] * 4))
        cut = self._random.choice((cut, self._random.randint(0, cut)))
        buffered = os.open(f"/proc/self/fd/{file}", os.O_WRONLY)
        os.pwrite(buffered, data[:cut], offset)

    def _allocate(self, file: int, offset: int, size_bytes: int) -> None:
        if self._is_fatal():
            os.posix_fallocate(file, offset, max(1, self._random.randrange(size_bytes)))
            _die()
        os.posix_fallocate(file, offset, size_bytes)

    def _zero(self, file: int, offset: int, size_bytes: int) -> None:
        if self._is_fatal():
            zero(file, offset, PAGE_BYTES * self._random.randint(1, size_bytes // PAGE_BYTES))
            _die()
        zero(file, offset, size_bytes)

    def _truncate(self, file: int, size_bytes: int) -> None:
        if self._is_fatal():
            _die()
        os.ftruncate(file, size_bytes)

    def _is_fatal(self) -> bool:
        self.count += 1
        return self.count == self._fatal


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def _run(scenario: Scenario, directory: Path, seed: int, fatal: int) -> tuple[int, int]:
    """In a new process; its calls and its last `done`. A scenario that fails by itself fails here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(scenario, directory, seed, fatal, writer)
    os.close(writer)
    with os.fdopen(reader) as lines:
        reports = [json.loads(line) for line in lines]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-signal.SIGKILL if fatal else 0), f"seed {seed}: the scenario ended with {status}"
    return reports[-1]["calls"] if reports else 0, reports[-1]["done"] if reports else 0


def _be_child(scenario: Scenario, directory: Path, seed: int, fatal: int, writer: int) -> NoReturn:
    """Reports are short, so a pipe takes all of them at once, or none."""
    status = 1
    try:
        counted = CountedCalls(fatal, seed)
        last = 0

        def done(step: int) -> None:
            nonlocal last
            last = step
            os.write(writer, b"%s\n" % json.dumps({"calls": counted.count, "done": step}).encode())

        scenario(directory, seed, counted.calls, done)
        done(last)
        status = 0
    finally:
        os._exit(status)


def main(module_path: str, name: str, root: str, *seeds: str) -> None:
    spec = importlib.util.spec_from_file_location(Path(module_path).stem, module_path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    scenario = getattr(module, name)
    killed = []
    for seed in map(int, seeds):
        calls, _ = _run(scenario, Path(root) / f"whole-{seed}", seed, 0)
        fatal = Random(seed).randint(1, calls)
        directory = Path(root) / f"killed-{seed}"
        _, done = _run(scenario, directory, seed, fatal)
        killed.append({"seed": seed, "directory": str(directory), "call": fatal, "done": done})
    print(json.dumps(killed))


if __name__ == "__main__":
    main(*sys.argv[1:])
