"""The workers that bench.handoff measures: `baton prefill-worker` and `baton decode-worker`, as they run anywhere."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.netns import slow_link
from bench.worker_processes import Process, ready_address, redis, secret_file, start_worker

LOCALHOST = "127.0.0.1"


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
        inside = slow.inside if slow else ()
        here, there = [*flags, f"--host={near}"], [*flags, f"--host={far}"]
        prefill = {send: start_worker(stack, "prefill-worker", [*there, f"--send={send}"], inside) for send in sends}
        decode = {
            verify: start_worker(stack, "decode-worker", [*here, f"--verify={verify}", "--local-prefill-tokens-max=0"])
            for verify in verifies
        }
        yield Cluster(_addresses(prefill), _addresses(decode), link.transport)


def _addresses(processes: Mapping[str, Process]) -> dict[str, str]:
    return {name: ready_address(process) for name, process in processes.items()}
