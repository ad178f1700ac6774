"""`python -m bench.tiers [--json]`: time to first token by where a prompt's KV lies, and how fast it comes up.

Real workers, a process each with one torch thread, asked one request at a time as a router asks. Each turn asks one
new prompt five times: cold, from HBM (a CPU worker's pool: main memory, too), from DDR, from the SSD, and on a worker
that fetches it from a peer's DDR. Ratios are of times in one turn. How fast blocks come up by themselves is measured
without an engine, beside one memcpy of as many bytes and the sequential read of a file on the same disk. At last,
engines with tiers and without take turns, a pair at a time, for what tiers cost a step.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.decode_calls import RequestFailed
from bench.models import Shape, make_model
from bench.tiers.driver import measure, peer_rate
from bench.tiers.figures import SOURCES, Measured, Sample, StepCost
from bench.tiers.raw import disk_read_gb_per_s, memcpy_gb_per_s
from bench.tiers.restores import restore_rates, restore_table
from bench.tiers.steps import step_costs
from bench.tiers.workers import workers
from bench.wide import wide_console
from bench.worker_processes import StartFailed
from kvcache.tiers.interface import StorageFormat

LENGTHS = (512, 1024, 2048, 4096, 8192)
SHAPE = Shape(context=8448)
RAW_BYTES = 512 * 2**20
RESTORE_BYTES = 64 * 2**20
"""What is moved at a time: the KV of 8,192 tokens."""


def run(
    lengths: Sequence[int],
    turns: int,
    pairs: int,
    seed: int,
    compression: StorageFormat,
    disk: Path | None,
    console: Console,
) -> Measured:
    """Raises StartFailed or RequestFailed."""
    with _scratch(disk, console) as (scratch, progress):
        task = progress.add_task("disk, memory, restores", total=3)
        advance: Callable[[], None] = partial(progress.advance, task)
        memcpy = memcpy_gb_per_s(RESTORE_BYTES)
        advance()
        disk_read, is_direct = disk_read_gb_per_s(scratch, RAW_BYTES)
        advance()
        rates = restore_rates(SHAPE, scratch, RESTORE_BYTES, compression)
        advance()
        make_model(model := scratch / "model", SHAPE)
        advance = partial(progress.advance, progress.add_task("prompts", total=2 * (turns * len(lengths) + 1)))
        with workers(model, scratch, scratch, compression) as running:
            samples: list[Sample] = uvloop.run(measure(running, SHAPE, lengths, turns, seed, advance))
        steps = _time_steps(model, scratch, pairs, turns, seed, progress)
    return Measured(samples, [*rates, peer_rate(samples, SHAPE)], memcpy, disk_read, is_direct, steps)


def run_steps(pairs: int, turns: int, seed: int, disk: Path | None, console: Console) -> list[StepCost]:
    """Raises StartFailed."""
    with _scratch(disk, console) as (scratch, progress):
        make_model(model := scratch / "model", SHAPE)
        return _time_steps(model, scratch, pairs, turns, seed, progress)


def _time_steps(model: Path, scratch: Path, pairs: int, turns: int, seed: int, progress: Progress) -> list[StepCost]:
    task = progress.add_task("steps", total=2 * pairs)
    return step_costs(model, scratch, pairs, turns, seed, partial(progress.advance, task))


@contextmanager
def _scratch(disk: Path | None, console: Console) -> Iterator[tuple[Path, Progress]]:
    """A directory on the disk to measure, and a picture of how far it has come."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="baton-", dir=disk) as made,
        Progress(*columns, console=console) as progress,
    ):
        yield Path(made), progress


# ---- tables


def ttft_table(measured: Measured) -> Table:
    made = Table(title="time to first token, ms (medians), and of cold", title_justify="left", box=box.SIMPLE_HEAD)
    made.add_column("tokens", justify="right")
    for source in SOURCES:
        made.add_column(source, justify="right")
    for tokens in measured.lengths:
        cells = []
        for source in SOURCES:
            ttft_s, of_cold = measured.ttft_s(source, tokens), measured.of_cold(source, tokens)
            cells.append("–" if ttft_s is None or of_cold is None else f"{ttft_s * 1000:,.1f} ({of_cold:.2f})")
        made.add_row(f"{tokens:,}", *cells)
    return made


def rate_table(measured: Measured) -> Table:
    made = Table(title="restores, GB/s", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("from", "GB/s", "of one memcpy", "of the raw read"):
        made.add_column(heading, justify="left" if heading == "from" else "right")
    for rate in measured.rates:
        of_memcpy, of_disk = rate.gb_per_s / measured.memcpy_gb_per_s, rate.gb_per_s / measured.disk_read_gb_per_s
        made.add_row(
            rate.source if rate.is_default else f"{rate.source}, verified {rate.verified}",
            f"{rate.gb_per_s:.2f}",
            f"{of_memcpy:.2f}",
            f"{of_disk:.2f}" if rate.source == "ssd" else "",
        )
    made.add_row("one memcpy", f"{measured.memcpy_gb_per_s:.2f}", "", "")
    how = "direct" if measured.is_direct else "through the page cache"
    made.add_row(f"raw sequential read ({how})", f"{measured.disk_read_gb_per_s:.2f}", "", "")
    return made


def step_table(costs: Sequence[StepCost]) -> Table:
    made = Table(title="an engine's steps, ms (medians)", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("work", "tiers", "with tiers", "without", "ratio", "of pairs", "of CPU time"):
        made.add_column(heading, justify="left" if heading in ("work", "tiers") else "right")
    for cost in costs:
        spread = f"{cost.of_plain_least:.3f}–{cost.of_plain_most:.3f}"
        ratios = f"{cost.of_plain:.3f}", spread, f"{cost.cpu_of_plain:.3f}"
        made.add_row(cost.work, cost.tiers, f"{cost.step_ms:.2f}", f"{cost.plain_step_ms:.2f}", *ratios)
    return made


def parse_lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 128 or max(lengths) > 8192:
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 128 to 8192, such as 512,4096")
    return lengths


def parse_compression(text: str) -> StorageFormat:
    if text == "none":
        return "none"
    if text == "int8":
        return "int8"
    raise typer.BadParameter(f"{text!r} is neither none nor int8")


def main(
    lengths: Annotated[str, typer.Option("--tokens", help="Prompt lengths")] = ",".join(map(str, LENGTHS)),
    turns: Annotated[int, typer.Option(min=1, help="New prompts of each length")] = 5,
    pairs: Annotated[int, typer.Option(min=1, help="Of engines, with tiers and without, whose steps are timed")] = 2,
    seed: Annotated[int, typer.Option(help="Of the prompts")] = 0,
    compression: Annotated[str, typer.Option(help="none or int8: how KV is kept below HBM")] = "none",
    disk: Annotated[
        Path | None, typer.Option(help="Directory on the disk to measure; default: the temporary one")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
    only_steps: Annotated[bool, typer.Option("--only-steps", help="A table of these alone")] = False,
    only_restores: Annotated[
        bool, typer.Option("--only-restores", help="A table of these alone, by what is verified, also of large blocks")
    ] = False,
) -> None:
    """Measures time to first token by the tier that a prompt's KV lies in, and how fast it comes up."""
    storage, console = parse_compression(compression), Console(stderr=True)
    if only_restores:
        with tempfile.TemporaryDirectory(prefix="baton-", dir=disk) as scratch:
            wide_console().print(restore_table(SHAPE, Path(scratch), RESTORE_BYTES, storage))
        return
    try:
        if only_steps:
            wide_console().print(step_table(run_steps(pairs, turns, seed, disk, console)))
            return
        measured = run(parse_lengths(lengths), turns, pairs, seed, storage, disk, console)
    except (RequestFailed, StartFailed) as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(measured.as_json(), indent=2))
    else:
        for table in (ttft_table(measured), rate_table(measured), step_table(measured.steps)):
            wide_console().print(table)
    is_wrong = measured.wrong_tokens > 0 and storage == "none"
    if is_wrong:
        console.print(f"error: {measured.wrong_tokens} first tokens differ from the cold ones", markup=False)
    raise typer.Exit(int(is_wrong))


if __name__ == "__main__":
    typer.run(main)
