"""The workers that bench.tiers measures: two with tiers, and one that fetches from the first."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.worker_processes import Process, ready_address, redis, secret_file, start_worker

POOL_BLOCKS: Mapping[str, int] = {"ddr": 1060, "ssd": 300, "peer": 1060}
"""Of 32 tokens. 300: a prompt of 8,192 and little more. Where prompts are fetched, four and little more: no more than a
quarter of a pool is filled by fetches, or for them, at one time."""
DDR_BYTES = 2**30
SSD_BYTES = 4 * 2**30


class Workers:
    """By what they are for: `ddr` has host memory below its pool, `ssd` a file as well, `peer` neither."""

    def __init__(self, stack: ExitStack, flags: Mapping[str, Sequence[str]]) -> None:
        """Starts them one after the other: each measures its own speed at the start."""
        self._stack, self._flags = stack, flags
        self._processes: dict[str, Process] = {}
        self.addresses: dict[str, str] = {}
        """Of their gRPC servers."""
        for name in flags:
            self._start(name)

    def restart(self, name: str) -> None:
        """Kills it, with nothing said before, and starts it again."""
        self._processes[name].kill()
        self._processes[name].wait()
        self._start(name)

    def _start(self, name: str) -> None:
        process = self._processes[name] = start_worker(self._stack, "decode-worker", self._flags[name])
        self.addresses[name] = ready_address(process)


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
            "ssd": [f"--ddr-bytes={DDR_BYTES}", f"--ssd-dir={disk}", f"--ssd-bytes={SSD_BYTES}"],
            "peer": [],
        }
        pools = {name: f"--kv-blocks={blocks}" for name, blocks in POOL_BLOCKS.items()}
        yield Workers(stack, {name: [*flags, pools[name], *own] for name, own in tiers.items()})
