"""`baton replay`: runs a trace through a simulated cluster under each policy named, and shows what that comes to."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter, ValidationError
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from baton.errors import SettingsError
from baton.settings import Bytes, Policy
from simulator.line import Admission
from simulator.profile import load_profile
from simulator.replay import Replay, Scenario
from simulator.report import Report
from simulator.tiers.worker_tiers import TierSizes
from simulator.trace import TraceRequest, at_rate, hit_rate_max, made_unique, read_trace

_SIZE = TypeAdapter(Bytes)


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """The command line's; each is checked by what takes it."""

    trace: Path
    profile: str
    prefill: int
    decode: int
    rate: float
    policies: tuple[Policy, ...]
    seed: int
    requests: int | None
    unique: bool
    slowdown: dict[str, float]
    kv_blocks: int | None
    admission: Admission | None
    tiers: TierSizes | None


def parse_policies(text: str) -> tuple[Policy, ...]:
    """Names with commas in between. Raises SettingsError."""
    known: dict[str, Policy] = {name: name for name in get_args(Policy)}
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise SettingsError("Name a policy.")
    if unknown := [name for name in names if name not in known]:
        raise SettingsError(f"There is no policy {unknown[0]}; there are {', '.join(known)}.")
    return tuple(known[name] for name in dict.fromkeys(names))


def parse_slowdown(text: str) -> dict[str, float]:
    """`decode-0=3,prefill-1=2`. Raises SettingsError."""
    slowdown = {}
    for part in filter(None, text.split(",")):
        worker, _, factor = part.partition("=")
        try:
            slowdown[worker.strip()] = float(factor)
        except ValueError:
            raise SettingsError(f"{part!r} does not say how slow: write it like decode-0=3.") from None
    return slowdown


def admission_of(worker_queue_s: float | None, deadline_s: float | None) -> Admission | None:
    """None: requests are placed as they come."""
    asked = {"worker_queue_s": worker_queue_s, "deadline_s": deadline_s}
    given = {name: value for name, value in asked.items() if value is not None}
    if any(value <= 0 for value in given.values()):
        raise SettingsError("A queue and a deadline are positive numbers of seconds.")
    return Admission(**given) if given else None


def size_of(option: str, text: str) -> int:
    try:
        return _SIZE.validate_python(text)
    except ValidationError as error:
        raise SettingsError(f"{option}: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None


def tiers_of(ddr_bytes: str, ssd_bytes: str) -> TierSizes | None:
    """Of sizes as people write them; None: there are none. Raises SettingsError."""
    ddr, ssd = size_of("--ddr-bytes", ddr_bytes), size_of("--ssd-bytes", ssd_bytes)
    return TierSizes(ddr, ssd) if ddr or ssd else None


def run_replay(options: ReplayOptions) -> tuple[list[Report], list[TraceRequest]]:
    """A report for each policy, and the trace as it was replayed.

    Raises SettingsError or InvalidRequest.
    """
    if options.rate <= 0:
        raise SettingsError("The rate must be positive.")
    profile = load_profile(options.profile).with_kv_blocks(options.kv_blocks)
    scenario = Scenario(
        profile, options.prefill, options.decode, options.seed, options.slowdown, options.admission, options.tiers
    )
    trace = at_rate(read_trace(options.trace, options.requests), options.rate)
    if options.unique:
        trace = made_unique(trace)
    return [replay_visibly(trace, scenario, policy) for policy in options.policies], trace


def replay_visibly(trace: Sequence[TraceRequest], scenario: Scenario, policy: Policy) -> Report:
    """With a bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(policy, total=len(trace))
        return Replay(trace, scenario, policy, lambda left: progress.update(task, completed=left)).run()


def render(reports: Sequence[Report], trace: Sequence[TraceRequest]) -> RenderableType:
    caption = (
        "Latencies: mean/p50/p99. Busy: prefill/decode workers.\n"
        f"Bound of the hit rate, with an infinite cache: {hit_rate_max(trace):.1%}."
    )
    columns = ("refused", "hit", "TTFT, s", "ITL, ms", "E2E, s", "busy, %", "tok/s")
    table = table_of(columns, map(row, reports), caption)
    if not reports[0].tiers:
        return table
    return Group(table, "", table_of(TIER_COLUMNS, chain(*map(tier_rows, reports)), TIER_CAPTION))


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> Table:
    """Beside the policies."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left", caption=caption)
    table.add_column("policy", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table


TIER_COLUMNS = ("tier", "hit", "restored, GB", "stored, GB", "held, GB", "of")
TIER_CAPTION = "Restored, stored: by all workers. Held: by one worker, at most."


def tier_rows(report: Report) -> Iterator[list[str]]:
    yield [report.policy, "hbm", f"{report.hit_rate_by_tier['hbm']:.1%}"]
    for tier, use in report.tiers.items():
        sizes = (use.restored_bytes, use.stored_bytes, use.held_bytes_max, use.limit_bytes)
        yield ["", tier, f"{report.hit_rate_by_tier[tier]:.1%}", *(f"{size / 1e9:,.0f}" for size in sizes)]


def row(report: Report) -> list[str]:
    return [
        report.policy,
        f"{report.refused:,}",
        f"{report.hit_rate:.1%}",
        report.ttft_s.shown(),
        report.itl_s.shown(1000),
        report.e2e_s.shown(),
        f"{100 * report.prefill_utilisation:.0f}/{100 * report.decode_utilisation:.0f}",
        f"{report.output_tokens_per_s:,.0f}",
    ]
