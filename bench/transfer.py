"""How fast KV blocks move: `python -m bench.transfer [--json] [--peer PYTHON]`.

Each transport that is installed, between two processes of this machine, in slices of several sizes and several totals;
beside one memcpy and a plain socket loop, each in processes of their own. With `--peer`, an interpreter that has
nixl-cu12, NIXL alone moves the same in the same run. All take turns, so that a drift of the machine hits them alike.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.transfer_end import EndFailed
from bench.transfer_plan import MIB, SLICE_BYTES, TOTAL_BYTES, Form, forms_of
from bench.transfer_sides import Figures, Side, baselines, measure, own_sides, peer_sides
from bench.wide import wide_console
from kvtransfer.registry import find_transport

TRANSPORTS = ("shm", "nixl", "ucx", "tcp")
QUICK_SLICES, QUICK_TOTALS = SLICE_BYTES[:2], TOTAL_BYTES[:2]
MOVED_S = 0.4
"""Each slice size and total, each turn, at least."""
MEMCPY, SOCKET, PEER = "memcpy", "socket", "nixl-"
Advance = Callable[[], None]


@dataclass(slots=True)
class Results:
    by_side: dict[str, dict[Form, Figures]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Sides that failed, with the reason."""

    def add(self, side: Side, form: Form, figures: Figures) -> None:
        self.by_side.setdefault(side.name, {}).setdefault(form, Figures(form.total_bytes)).add(figures)

    def best(self, name: str, total_bytes: int) -> float | None:
        """GB/s with the slices that suit it best."""
        of_total = [f.gb_per_s for form, f in self.by_side.get(name, {}).items() if form.total_bytes == total_bytes]
        return max(of_total, default=None)

    @property
    def totals(self) -> list[int]:
        return sorted({form.total_bytes for forms in self.by_side.values() for form in forms})


def installed() -> tuple[list[str], dict[str, str]]:
    """Transports that can be used here, and why the others cannot."""
    missing = {name: reason for name in TRANSPORTS if (reason := find_transport(name).missing())}
    return [name for name in TRANSPORTS if name not in missing], missing


def measure_all(
    sides: Sequence[Side], slices: Sequence[int], totals: Sequence[int], rounds: int, results: Results, advance: Advance
) -> None:
    for _ in range(rounds):
        for slice_bytes in slices:
            for side in sides:
                measure_turn(side, forms_of(slice_bytes, totals), results)
                advance()


def measure_turn(side: Side, forms: Sequence[Form], results: Results) -> None:
    """A side that failed once has no more turns."""
    if side.name in results.left_out:
        return
    try:
        for form, figures in measure(side, forms, MOVED_S):
            results.add(side, form, figures)
    except EndFailed as error:
        results.left_out[side.name] = str(error)


# ---- what is told


def to_json(results: Results) -> dict[str, Any]:
    largest = max(results.totals)
    return {
        "memcpy_gb_per_s": results.best(MEMCPY, largest),
        "socket_gb_per_s": results.best(SOCKET, largest),
        "baselines": [
            {
                "total_bytes": total,
                "memcpy_gb_per_s": results.best(MEMCPY, total),
                "socket_gb_per_s": results.best(SOCKET, total),
            }
            for total in results.totals
        ],
        "results": rows(results.by_side, lambda name: name in TRANSPORTS),
        "peer": rows(results.by_side, lambda name: name.startswith(PEER)),
        "left_out": results.left_out,
    }


def rows(by_side: Mapping[str, Mapping[Form, Figures]], belongs: Callable[[str], bool]) -> list[dict[str, Any]]:
    return [
        {
            "transport": name,
            "slice_bytes": form.slice_bytes,
            "total_bytes": form.total_bytes,
            "gb_per_s": figures.gb_per_s,
            "gb_per_s_median": figures.gb_per_s_median,
            "cpu_s_per_gb": figures.cpu_s_per_gb,
            "latency_s": median(figures.latencies_s),
        }
        for name, forms in by_side.items()
        if belongs(name)
        for form, figures in forms.items()
    ]


def speed_table(results: Results) -> Table:
    """A row for each way and slice size, a column for each total."""
    title = "GB/s, best (CPU seconds of both processes per GB)"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    made.add_column("")
    for heading in ("slices", "µs one block", *(f"{total // MIB:,} MiB" for total in results.totals)):
        made.add_column(heading, justify="right")
    made.add_row(MEMCPY, "", "", *(number(results.best(MEMCPY, total)) for total in results.totals))
    for name, forms in results.by_side.items():
        for slice_bytes in sorted({form.slice_bytes for form in forms}) if name != MEMCPY else ():
            of_size = {form.total_bytes: f for form, f in forms.items() if form.slice_bytes == slice_bytes}
            latency_s = median(second for figures in of_size.values() for second in figures.latencies_s)
            cells = (cell(of_size.get(total)) for total in results.totals)
            made.add_row(name, f"{slice_bytes // 1024:,} KiB", f"{latency_s * 1e6:,.0f}", *cells)
    return made


def cell(figures: Figures | None) -> str:
    return "–" if figures is None else f"{figures.gb_per_s:.1f} ({figures.cpu_s_per_gb:.2f})"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def main(
    peer: Annotated[
        Path | None, typer.Option(exists=True, help="A Python that has nixl-cu12, to measure it bare")
    ] = None,
    transports: Annotated[str, typer.Option(help="Ours to measure; default: all that are installed")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Small slices and totals only, one turn each")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
) -> None:
    """Measures the KV transports between two processes; with whole totals it takes 2 GiB of memory and some minutes."""
    found, missing = installed()
    results = Results(left_out=missing)
    sides = [*baselines(), *own_sides(chosen(transports, found)), *(peer_sides(peer) if peer else ())]
    slices, totals = (QUICK_SLICES, QUICK_TOTALS) if quick else (SLICE_BYTES, TOTAL_BYTES)
    rounds = 1 if quick else rounds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("transfers", total=rounds * len(slices) * len(sides))
        measure_all(sides, slices, totals, rounds, results, partial(progress.advance, bar))
    if as_json:
        typer.echo(json.dumps(to_json(results), indent=2))
    else:
        wide_console().print(speed_table(results))
    for name, reason in results.left_out.items():
        Console(stderr=True).print(f"{name} was left out: {reason}", markup=False)


def chosen(transports: str, found: Sequence[str]) -> list[str]:
    names = transports.split(",") if transports else list(found)
    if unknown := [name for name in names if name not in found]:
        raise typer.BadParameter(f"{unknown[0]!r} cannot be used here; there are {', '.join(found)}")
    return names


if __name__ == "__main__":
    typer.run(main)
