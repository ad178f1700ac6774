"""`python -m bench.cache_soak [--json]`: half an hour of questions about ledgers whose KV is ten times what HBM holds.

A real router, prefill worker and two decode workers, a process each, with the demo's recall model: a wrong, stale or
misplaced block shows as a wrong name. Meanwhile the tiers are looked at once a second: no tier may hold more than its
limit, and no process may grow. The exit status says whether all of that held.
"""

import asyncio
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich import box
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from baton.clock import monotonic
from baton.settings import RECALL_MODEL
from bench.cache_soak.load import Tally, ask_until
from bench.cache_soak.watch import Watch
from bench.wide import wide_console
from bench.worker_processes import Process, ready_address, ready_url, redis, secret_file, start_worker
from engine.recall.text import make_ledger

WORKERS = ("prefill-worker", "decode-worker", "decode-worker")
LEDGER_LINES = 100
LEDGER_BLOCKS = 25
"""Of 32 tokens, 8 to a line."""
POOL_BLOCKS = 160
BLOCK_BYTES = 256 * 1024
DDR_BLOCKS, SSD_BLOCKS = 240, 1600
"""Of each worker."""
TIMES_HBM = 10
GROWTH_MAX = 0.10
"""Of resident memory, from the second tenth of the time to the last."""
JUDGED_LOOKS_MIN = 300
"""In a run with fewer, growth is told and not judged: pool and host memory are resident only once all was touched."""


def run(minutes: float, concurrency: int, seed: int, scratch: Path, advance: Callable[[], None]) -> tuple[Tally, Watch]:
    ledgers = TIMES_HBM * POOL_BLOCKS * len(WORKERS) // LEDGER_BLOCKS
    with ExitStack() as stack:
        common = [
            f"--redis-url={stack.enter_context(redis(scratch))}",
            f"--model={RECALL_MODEL}",
            f"--cluster-secret-file={secret_file(scratch)}",
            "--log-level=warning",
        ]
        tiers = [
            f"--kv-blocks={POOL_BLOCKS}",
            f"--ddr-bytes={DDR_BLOCKS * BLOCK_BYTES}",
            f"--ssd-dir={scratch / 'ssd'}",
            f"--ssd-bytes={SSD_BLOCKS * BLOCK_BYTES}",
            "--threads=1",
        ]
        (scratch / "ssd").mkdir()
        processes: dict[str, Process] = {}
        addresses: dict[str, str] = {}
        for number, command in enumerate(WORKERS):
            name = f"{command}-{number}"
            processes[name] = start_worker(stack, command, [*common, *tiers, f"--worker-id={name}"])
            addresses[name] = ready_address(processes[name])
        processes["router"] = start_worker(stack, "router", [*common, "--http-port=0"])
        watch = Watch({name: process.pid for name, process in processes.items()})
        tally = Tally()
        work = soak(
            ready_url(processes["router"]), addresses, ledgers, minutes, concurrency, seed, tally, watch, advance
        )
        uvloop.run(work)
    return tally, watch


async def soak(
    url: str,
    addresses: dict[str, str],
    ledgers: int,
    minutes: float,
    concurrency: int,
    seed: int,
    tally: Tally,
    watch: Watch,
    advance: Callable[[], None],
) -> None:
    made = [make_ledger(LEDGER_LINES, seed * 10**6 + number) for number in range(ledgers)]
    until_s, done = monotonic() + 60 * minutes, asyncio.Event()
    watching = asyncio.create_task(watch.run(addresses, done))
    try:
        await ask_until(url, RECALL_MODEL, made, until_s, concurrency, seed, tally, advance)
    finally:
        done.set()
        await watching


def is_success(tally: Tally, watch: Watch) -> bool:
    is_right = tally.answered > 0 and not (tally.wrong or tally.failures)
    return is_right and not (watch.over_limit or watch.turned_off or watch.missed or growing(watch))


def growing(watch: Watch) -> list[str]:
    """Processes that grew by more than GROWTH_MAX, or hold more threads or several more descriptors than before."""
    found = list[str]()
    if watch.looks < JUDGED_LOOKS_MIN:
        return found
    for name in watch.processes:
        warm, end = watch.growth(name)
        grew = end.rss_bytes > warm.rss_bytes * (1 + GROWTH_MAX) or end.threads > warm.threads + 2
        if grew or end.descriptors > warm.descriptors + 8:
            found.append(name)
    return found


def complaints(watch: Watch) -> list[str]:
    found = []
    if watch.over_limit:
        found.append(f"tiers held more than they may {watch.over_limit} times")
    if watch.missed:
        found.append(f"{watch.missed} times a process was not there, or a worker did not answer")
    found += [f"turned off: {tier}" for tier in sorted(watch.turned_off)]
    return found + [f"growing: {name}" for name in growing(watch)]


def as_json(tally: Tally, watch: Watch) -> dict[str, Any]:
    growth = {name: watch.growth(name) for name in watch.processes}
    return {
        "is_success": is_success(tally, watch),
        **asdict(tally),
        "hit_tokens": dict(watch.hit_tokens()),
        "looks": watch.looks,
        "looks_missed": watch.missed,
        "is_growth_judged": watch.looks >= JUDGED_LOOKS_MIN,
        "growing": growing(watch),
        "tiers_over_limit": watch.over_limit,
        "tiers_turned_off": sorted(watch.turned_off),
        "corrupt_blocks": sum(status.corrupt_blocks for status in watch.statuses.values()),
        "dropped_blocks": sum(status.dropped_blocks for status in watch.statuses.values()),
        "processes": {name: {"warm": asdict(warm), "end": asdict(end)} for name, (warm, end) in growth.items()},
    }


def tables(tally: Tally, watch: Watch) -> list[Table]:
    asked = Table(title="questions", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("answered", "wrong", "failed", "given up", "prompt tokens", "cached", *watch.hit_tokens()):
        asked.add_column(heading, justify="right")
    asked.add_row(
        f"{tally.answered:,}",
        f"{tally.wrong:,}",
        f"{tally.failures.total():,}",
        f"{tally.given_up:,}",
        f"{tally.prompt_tokens:,}",
        f"{tally.cached_tokens / max(tally.prompt_tokens, 1):.1%}",
        *(f"{tokens:,}" for tokens in watch.hit_tokens().values()),
    )
    held = Table(title="what each process holds, warm and at the end", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("process", "MiB", "at the end", "descriptors", "at the end", "threads", "at the end"):
        held.add_column(heading, justify="left" if heading == "process" else "right")
    for name in watch.processes:
        warm, end = watch.growth(name)
        pairs = ((warm.descriptors, end.descriptors), (warm.threads, end.threads))
        sizes = [f"{each.rss_bytes / 2**20:,.0f}" for each in (warm, end)]
        held.add_row(name, *sizes, *(str(figure) for pair in pairs for figure in pair))
    return [asked, held]


def main(
    minutes: Annotated[float, typer.Option(min=0.1)] = 30.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions at a time")] = 4,
    seed: Annotated[int, typer.Option(help="Of the ledgers and questions")] = 0,
    disk: Annotated[Path | None, typer.Option(help="Directory for the SSD's files; default: the temporary one")] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
) -> None:
    """Keeps three tiers under load and checks every answer, every limit, and that nothing grows."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}: {task.completed:,} asked"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="baton-", dir=disk) as made,
        Progress(*columns, console=console) as progress,
    ):
        advance = partial(progress.advance, progress.add_task(f"{minutes:g} minutes", total=None))
        tally, watch = run(minutes, concurrency, seed, Path(made), advance)
    if as_json_:
        typer.echo(json.dumps(as_json(tally, watch), indent=2))
    else:
        for table in tables(tally, watch):
            wide_console().print(table)
    for reason, count in tally.failures.items():
        console.print(f"{count} failed: {reason}", markup=False)
    for complaint in complaints(watch):
        console.print(complaint, markup=False)
    raise typer.Exit(int(not is_success(tally, watch)))


if __name__ == "__main__":
    typer.run(main)
