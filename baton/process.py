"""This process and others: who they are, in a way that a recycled process id cannot fake; and a quiet heap."""

import gc
import os
import resource
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process of this machine and pid namespace."""

    pid: int
    started_ticks: int
    """Clock ticks from boot to the process's start: field 22 of /proc/PID/stat."""

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """None if there is no such process, or only its zombie is left."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
        return None if state in "ZX" else cls(pid, int(fields[18]))

    @classmethod
    def own(cls) -> "ProcessIdentity":
        identity = cls.of(os.getpid())
        assert identity is not None
        return identity

    @property
    def is_alive(self) -> bool:
        return ProcessIdentity.of(self.pid) == self


def freeze_heap() -> None:
    """At the end of a service's start: keeps what is loaded by now, which stays, out of garbage collections.
    A full one over torch's and transformers' objects would stop every stream for 100 ms and more."""
    gc.collect()
    gc.freeze()


def raise_descriptor_limit() -> None:
    """To what the system allows: each request in flight holds a socket or two, and the usual 1,024 are soon used up."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
