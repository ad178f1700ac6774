"""The router's decisions: `python -m bench.router [--json] [--peer PYTHON]`.

Select-and-reserve before an index that holds blocks, events into the index, the index's size; and how each grows. With
`--peer`, an interpreter that has ai-dynamo-runtime, the same work goes through NVIDIA Dynamo's SelectionService and
RadixTree in the same run, ours and theirs by turns, so that a drift of the machine hits both alike.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.measure import percentile
from bench.router_own import OwnSide
from bench.router_sides import EventFigures, PeerSide, Side
from bench.router_workload import EVENT_BLOCKS, Form, Workload

IN_FLIGHT = 32
"""Reservations held at any time."""
BATCH = 100
"""Selections before it is the other side's turn."""
USUAL = Workload(workers=64, indexed_blocks=100_000, prompt_blocks=128)
WORKERS = (8, 64, 256)
PROMPT_BLOCKS = (8, 32, 128, 512)
INDEXED_BLOCKS = (10_000, 100_000, 1_000_000)
Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Series:
    """One list of the result: the same question for several workloads."""

    name: str
    title: str
    workloads: tuple[Workload, ...]
    form: Form = "tokens"


ONE_POOL = tuple(replace(USUAL, workers=workers) for workers in WORKERS)
TWO_POOLS = tuple(replace(USUAL, workers=workers, pools=2) for workers in WORKERS)
SELECT_SERIES = (
    Series("select", "one pool, prompts as token ids", ONE_POOL),
    Series("select_hashed", "one pool, prompts as block names", ONE_POOL, "hashes"),
    Series("select_two_pools", "half prefill, half decode; token ids", TWO_POOLS),
    Series("select_two_pools_hashed", "half prefill, half decode; block names", TWO_POOLS, "hashes"),
    Series("growth_prompt", "longer prompts", tuple(replace(USUAL, prompt_blocks=b) for b in PROMPT_BLOCKS)),
    Series("growth_index", "a larger index", tuple(replace(USUAL, indexed_blocks=b) for b in INDEXED_BLOCKS)),
)
EVENT_WORKLOADS = tuple(replace(USUAL, indexed_blocks=blocks) for blocks in INDEXED_BLOCKS)


@dataclass(frozen=True, slots=True)
class Latency:
    """Of select-and-reserve."""

    workload: Workload
    p50_us: float
    p99_us: float

    @classmethod
    def of(cls, workload: Workload, each_us: list[float]) -> "Latency":
        p50_us, p99_us = percentile(each_us, 50), percentile(each_us, 99)
        assert p50_us is not None and p99_us is not None
        return cls(workload, p50_us, p99_us)

    def as_json(self) -> dict[str, Any]:
        return {
            "workers": self.workload.workers,
            "blocks": self.workload.prompt_blocks,
            "indexed_blocks": self.workload.indexed_blocks,
            "p50_us": round(self.p50_us, 1),
            "p99_us": round(self.p99_us, 1),
        }


Sides = Mapping[str, Side]
"""By the prefix that their figures have in the result: none for ours."""


def measure_select(sides: Sides, workload: Workload, form: Form, selections: int) -> dict[str, Latency]:
    """Both sides' selections, a batch each by turns, after one batch that does not count."""
    for side in sides.values():
        side.start(workload, IN_FLIGHT)
        side.select(BATCH, form)
    each_us: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(max(1, selections // BATCH)):
        for name, side in sides.items():
            each_us[name] += side.select(BATCH, form)
    return {name: Latency.of(workload, values) for name, values in each_us.items()}


def measure_all_selects(sides: Sides, selections: int, advance: Advance) -> dict[str, dict[str, list[Latency]]]:
    """By series, then by side."""
    results: dict[str, dict[str, list[Latency]]] = {}
    for series in SELECT_SERIES:
        results[series.name] = {name: [] for name in sides}
        for workload in series.workloads:
            for name, latency in measure_select(sides, workload, series.form, selections).items():
                results[series.name][name].append(latency)
            advance()
    return results


def measure_events(sides: Sides, advance: Advance) -> dict[str, list[EventFigures]]:
    results: dict[str, list[EventFigures]] = {name: [] for name in sides}
    for workload in EVENT_WORKLOADS:
        for name, side in sides.items():
            results[name].append(side.events(workload))
        advance()
    return results


def to_json(selects: Mapping[str, Mapping[str, list[Latency]]], events: Mapping[str, list[EventFigures]]) -> Any:
    result: dict[str, Any] = {}
    for series, by_side in selects.items():
        for name, latencies in by_side.items():
            result[name + series] = [latency.as_json() for latency in latencies]
    for name, figures in events.items():
        usual = next(each for each in figures if each.indexed_blocks == USUAL.indexed_blocks)
        result[f"{name}events_per_s"] = round(usual.stored_per_s)
        result[f"{name}index_bytes_per_block"] = round(figures[-1].bytes_per_block, 1)
        result[f"{name}growth_events"] = [each.as_json() for each in figures]
    return result


# ---- tables


def select_table(series: Series, by_side: Mapping[str, list[Latency]]) -> Table:
    made = Table(title=f"select and reserve: {series.title}", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("workers", "prompt blocks", "indexed blocks", "ours p50 µs", "p99", "peer p50 µs", "p99"):
        made.add_column(heading, justify="right")
    for row, workload in enumerate(series.workloads):
        latencies = [by_side[name][row] for name in ("", "peer_") if name in by_side]
        cells = [f"{value:.0f}" for latency in latencies for value in (latency.p50_us, latency.p99_us)]
        cells += ["–"] * (4 - len(cells))
        counts = (workload.workers, workload.prompt_blocks, workload.indexed_blocks)
        made.add_row(*(f"{each:,}" for each in counts), *cells)
    return made


def event_table(events: Mapping[str, list[EventFigures]]) -> Table:
    title = f"events from bytes into the index, {EVENT_BLOCKS} blocks each, {USUAL.workers} workers"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", "indexed blocks", "stored /s", "removed /s", "bytes / block"):
        made.add_column(heading, justify="right")
    for name, figures in events.items():
        for each in figures:
            cells = (each.indexed_blocks, each.stored_per_s, each.removed_per_s, each.bytes_per_block)
            made.add_row("peer" if name else "ours", *(f"{value:,.0f}" for value in cells))
    return made


def main(
    peer: Annotated[Path | None, typer.Option(exists=True, help="A Python that has ai-dynamo-runtime")] = None,
    selections: Annotated[int, typer.Option(min=BATCH, help="For each row")] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
) -> None:
    """Measures placement and the prefix index, and the same work in NVIDIA Dynamo's router."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as stack, Progress(*columns, console=Console(stderr=True)) as progress:
        sides: dict[str, Side] = {"": OwnSide()}
        if peer is not None:
            sides["peer_"] = stack.enter_context(PeerSide(peer))
        rows = sum(len(series.workloads) for series in SELECT_SERIES) + len(EVENT_WORKLOADS)
        advance = partial(progress.advance, progress.add_task("workloads", total=rows))
        selects = measure_all_selects(sides, selections, advance)
        events = measure_events(sides, advance)
    if as_json:
        typer.echo(json.dumps(to_json(selects, events), indent=2))
        return
    console = Console()
    for series in SELECT_SERIES:
        console.print(select_table(series, selects[series.name]))
    console.print(event_table(events))


if __name__ == "__main__":
    typer.run(main)
