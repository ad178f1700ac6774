"""What bench.router compares: a side is asked to select, and to take events; the peer's side is a process."""

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.router_workload import Form, Workload

PROJECT = Path(__file__).parents[1]
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class EventFigures:
    """Of an index that was empty, took what the workload's workers stored, and then what they removed."""

    indexed_blocks: int
    """Distinct."""
    stored_per_s: float
    """Blocks, a block on two workers counted twice."""
    removed_per_s: float
    bytes_per_block: float
    """Of the index when all was stored, for each distinct block, with whoever holds it."""

    @classmethod
    def of(cls, workload: Workload, stored_s: float, removed_s: float, index_bytes: float) -> "EventFigures":
        distinct = workload.shared_blocks + workload.conversations * workload.own_blocks
        stored = sum(step.end - step.first for step in workload.stored())
        removed = sum(step.end - step.first for step in workload.removed())
        return cls(workload.indexed_blocks, stored / stored_s, removed / removed_s, index_bytes / distinct)

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 1) for name, value in asdict(self).items()}


class Side(Protocol):
    """Ours or the peer's."""

    def start(self, workload: Workload, in_flight: int) -> None:
        """Forgets what was before; returns when the index holds what the workload's workers stored. From then on so
        many reservations are kept at any time."""

    def select(self, selections: int, form: Form) -> list[float]:
        """Microseconds of each select-and-reserve. Letting go of reservations is not timed."""

    def events(self, workload: Workload) -> EventFigures:
        """From bytes into an index of their own."""


class PeerSide:
    """bench.router_peer in the peer's interpreter; a context manager."""

    def __init__(self, python: Path) -> None:
        self._python = python

    def __enter__(self) -> "PeerSide":
        self._process = subprocess.Popen(
            [self._python, "-m", "bench.router_peer"],
            cwd=PROJECT,
            env=os.environ | {"DYN_LOG": "error"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Its standard input ends, and with it the process."""
        try:
            self._process.communicate(timeout=STOP_TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.wait()

    def start(self, workload: Workload, in_flight: int) -> None:
        self._ask(do="start", in_flight=in_flight, **asdict(workload))

    def select(self, selections: int, form: Form) -> list[float]:
        each_us: list[float] = self._ask(do="select", selections=selections, form=form)
        return each_us

    def events(self, workload: Workload) -> EventFigures:
        """In a process of its own: what it grows by is told by how the process does, whose heap must be fresh."""
        with PeerSide(self._python) as fresh:
            return EventFigures.of(workload, *fresh._ask(do="events", **asdict(workload)))

    def _ask(self, **command: Any) -> Any:
        """Raises RuntimeError if the process ended instead of answering; it said why on standard error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"the peer's process ended instead of answering to {command['do']!r}; see above")
        return json.loads(answer)
