"""The workers that bench.tiers measures: two with tiers, and one that fetches from the first."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.worker_processes import ready_address, redis, secret_file, start_worker

POOL_BLOCKS: Mapping[str, int] = {"ddr": 1060, "ssd": 300, "peer": 1060}
"""Of 32 tokens. 300: a prompt of 8,192 and little more, so that two others push it out. Where prompts are fetched, four
and little more: no more than a quarter of a pool is filled by fetches, or for them, at one time."""
DDR_BYTES = 2**30
SMALL_DDR_BYTES = 48 * 2**20
"""Of the worker whose blocks soon go on to the SSD: three in four of a prompt of 8,192 tokens."""
SSD_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Workers:
    """gRPC addresses by what they are for: `ddr` has much host memory, `ssd` little and a file, `peer` neither."""

    addresses: Mapping[str, str]


@contextmanager
def workers(model: Path, directory: Path, disk: Path, compression: str) -> Iterator[Workers]:
    """They stop with the context. `disk` is where the SSD's file goes. Raises StartFailed."""
    with ExitStack() as stack:
        flags = [
            f"--redis-url={stack.enter_context(redis(directory))}",
            f"--model={model}",
            f"--cluster-secret-file={secret_file(directory)}",
            f"--kv-compression={compression}",
            "--served-model-name=bench",
            "--threads=1",
            "--log-level=warning",
        ]
        tiers = {
            "ddr": [f"--ddr-bytes={DDR_BYTES}"],
            "ssd": [f"--ddr-bytes={SMALL_DDR_BYTES}", f"--ssd-dir={disk}", f"--ssd-bytes={SSD_BYTES}"],
            "peer": [],
        }
        addresses = {}
        for name, own in tiers.items():  # one after the other: each measures its own speed at the start
            addresses[name] = ready_address(
                start_worker(stack, "decode-worker", [*flags, f"--kv-blocks={POOL_BLOCKS[name]}", *own])
            )
        yield Workers(addresses)
