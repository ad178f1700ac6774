"""The tables of docs/replay.md: `python -m bench.replay TRACE > docs/replay.md`.

Every placement policy on the same requests, through the real router and scheduler code on simulated H100s: below, at
and above the knee of the trace, without any reuse, with a slow worker, with larger caches, with tiers below HBM, and on
made-up workloads. Takes some 100 replays of about 10 s of CPU time each, and with tiers a minute; `--jobs` run at once.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.progress import Progress

from baton.latency import TIERS as TIER_NAMES
from baton.settings import Policy
from simulator.profile import load_profile
from simulator.replay import Replay, Scenario
from simulator.report import Report, three_digits
from simulator.tiers.worker_tiers import TierSizes
from simulator.trace import TraceRequest, at_rate, hit_rate_max, made_unique, read_trace
from simulator.workloads import Conversations, Strangers

POLICIES: tuple[Policy, ...] = get_args(Policy)
OURS = POLICIES[0]
SYNTHETIC_REQUESTS = 6000
SYNTHETIC_SEED = 1
BELOW, AT, ABOVE = 1.5, 2.5, 3.5
SWEEP = (1.0, BELOW, 2.0, AT, 3.0, ABOVE)


@dataclass(frozen=True, slots=True)
class Case:
    """What is replayed: the trace (or a made-up one) at a rate, on a cluster."""

    rate: float
    workload: str = "trace"
    """trace, unique, conversations or strangers."""
    profile: str = "h100-8b"
    prefill: int = 4
    decode: int = 6
    slow: str = ""
    kv_blocks: int | None = None
    seed: int = 0
    tiers: TierSizes | None = None


@dataclass(frozen=True, slots=True)
class Run:
    case: Case
    policy: Policy


Reports = Mapping[Run, Report]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: which cases it needs, and how it tells of them."""

    cases: Sequence[Case]
    lines: Callable[[Reports], Iterable[str]]
    policies: Sequence[Policy] = POLICIES


def requests_of(case: Case, trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    if case.workload == "conversations":
        trace = Conversations().trace(SYNTHETIC_REQUESTS, SYNTHETIC_SEED)
    elif case.workload == "strangers":
        trace = Strangers(arrivals_per_s=1.0).trace(SYNTHETIC_REQUESTS, SYNTHETIC_SEED)
    requests = at_rate(trace, case.rate)
    return made_unique(requests) if case.workload == "unique" else requests


def replay(run: Run, trace: Sequence[TraceRequest]) -> Report:
    case = run.case
    slowdown = {case.slow: SLOWED} if case.slow else {}
    profile = load_profile(case.profile).with_kv_blocks(case.kv_blocks)
    scenario = Scenario(profile, case.prefill, case.decode, case.seed, slowdown, tiers=case.tiers)
    return Replay(requests_of(case, trace), scenario, run.policy).run()


# ---- the page

SLOWED = 3.0
HEAD = """\
# Replays

Made by `python -m bench.replay TRACE > docs/replay.md`; [simulator.md](simulator.md) says what is simulated and what
is real. The trace is Mooncake's conversation trace (FAST'25): {requests:,} requests, {prompt:,.0f} prompt tokens and
{output:,.0f} generated ones each on average, {per_s:.2f} a second at rate 1. The cluster is 4 prefill and 6 decode
workers, each one H100 that serves Llama 3.1 8B ([h100-8b.yaml](../simulator/profiles/h100-8b.yaml)), unless a table
says otherwise. Requests are placed as they come (no waiting at the router); seed 0. TTFT is from arrival to the first
token at the decode worker; the gaps between tokens are ITL. Latencies are mean / p50 / p99. `busy`: the share of the
time that prefill / decode workers were computing. `on decode`: prompts that the decode worker computed itself.

The pools hold {capacity:.1%} of the trace's different blocks, so no policy comes near the bound of the hit rate, which
an infinite cache shared by all would reach: **{bound:.1%}** of the prompts' blocks.
"""


def sections() -> list[Section]:
    below, at, above = (Case(rate) for rate in (BELOW, AT, ABOVE))
    uniques = [Case(rate, "unique") for rate in (BELOW, AT, ABOVE)]
    slowed = [Case(2.0, slow=worker) for worker in ("prefill-0", "decode-0")]
    return [
        Section([Case(rate) for rate in SWEEP], lambda r: sweep([Case(rate) for rate in SWEEP], r)),
        titled(f"## Below the knee: rate {BELOW:g}", below),
        titled(f"## At the knee: rate {AT:g}", at),
        titled(f"## Above the knee: rate {ABOVE:g}", above),
        *(titled(f"## No reuse: every block made unique, rate {case.rate:g}", case) for case in uniques),
        *(
            titled(f"## One worker slowed {SLOWED:g}×: {case.slow}, rate {case.rate:g}", case, told_of_slow(case))
            for case in slowed
        ),
        titled("## Caches ten times as large: rate 2.5", Case(AT, kv_blocks=8030), CACHES),
        Section(TIERED, tiered, (OURS,)),
        titled("## Conversations", Case(7.0, "conversations", prefill=2, decode=3), CONVERSATIONS),
        titled("## Strangers", Case(3.5, "strangers", prefill=2, decode=2), STRANGERS),
        titled("## Llama 3.1 70B on workers of four H100s: rate 1.25", Case(1.25, profile="h100-70b")),
        Section([Case(AT, seed=seed) for seed in SEEDS], seeds),
    ]


CACHES = "As lower tiers would give: how much more there is to find, and who finds it."
TIERED_RATES = (BELOW, AT, ABOVE)
TIERED_SIZES = (None, TierSizes(64 * 2**30), TierSizes(256 * 2**30), TierSizes(256 * 2**30, 2 * 2**40))
TIERED = [Case(rate, tiers=tiers) for rate in TIERED_RATES for tiers in TIERED_SIZES]
TIERS = """\
The real tiers over simulated devices ([simulator.md](simulator.md)), under least-added-latency. One row is
`baton replay TRACE --profile h100-8b --prefill 4 --decode 6 --rate 2.5 --ddr-bytes 256GiB --ssd-bytes 2TiB`.
`HBM / DDR / SSD`: the shares of all prompts' blocks that were found there. `restored`: what came up, and `to SSD`: what
was written there, by all workers together."""
TIERS_MEANING = """\
What it shows: most of what this trace repeats, it repeats after HBM has given it up. Host memory finds the greater part
of that, and an SSD below it some more. Neither mean nor p99 is worse for it anywhere, nor are those of the gaps between
tokens. What is saved grows with the load, because prompts that need not be computed are not waited for.

What it does not show: devices have the speeds of their data sheets, and what threads, digests and Python cost is not
counted (`python -m bench.tiers` measures it, on one machine). 256 GiB a worker are all the memory of a machine with
eight H100s and 2 TB. Nothing is fetched from peers: what lies on another worker than the one chosen is computed again.
What is written to the SSD is mostly its file as it fills for the first time, which is written in full; how it wears
after that, an hour of traffic does not tell."""
CONVERSATIONS = """\
Made up: conversations of five turns on average that open with one of eight system prompts of 2,048 tokens, 3.5 new ones
a second; 2 prefill and 3 decode workers."""
STRANGERS = """\
Made up: a Poisson process of 3.5 prompts a second that share nothing, exponential lengths of 6,000 tokens on average;
2 prefill and 2 decode workers."""
SEEDS = (0, 1, 2)


def told_of_slow(case: Case) -> str:
    return (
        f"Everything that {case.slow} computes takes {SLOWED:g} times as long. Nobody tells the router: the worker "
        "fits its latency model to what it measures. `there`: the share of requests that went to it."
    )


def titled(title: str, case: Case, words: str = "") -> Section:
    def lines(reports: Reports) -> Iterator[str]:
        yield title
        yield ""
        if words:
            yield words
            yield ""
        yield from table([reports[Run(case, policy)] for policy in POLICIES], case.slow)

    return Section([case], lines)


def table(reports: Sequence[Report], slow: str) -> Iterator[str]:
    extra = (" there |", "---:|") if slow else ("", "")
    yield "| policy | refused | hit rate | TTFT, s | ITL, ms | E2E, s | busy, % | on decode |" + extra[0]
    yield "|---|---:|---:|---:|---:|---:|---:|---:|" + extra[1]
    for report in reports:
        there = f" {report.placed_on(slow):.0%} |" if slow else ""
        yield row(report) + there
    yield ""
    yield verdict(reports)
    yield ""


def row(report: Report) -> str:
    busy = f"{100 * report.prefill_utilisation:.0f} / {100 * report.decode_utilisation:.0f}"
    cells = (
        report.policy,
        f"{report.refused:,}",
        f"{report.hit_rate:.1%}",
        report.ttft_s.shown(between=" / "),
        report.itl_s.shown(1000, " / "),
        report.e2e_s.shown(between=" / "),
        busy,
        f"{report.local_prefills / max(report.requests - report.refused, 1):.0%}",
    )
    return "| " + " | ".join(cells) + " |"


def verdict(reports: Sequence[Report]) -> str:
    """Ours beside the best of the others, in mean and in p99."""
    ours, others = reports[0], reports[1:]
    mean = min(others, key=lambda report: report.ttft_s.mean)
    p99 = min(others, key=lambda report: report.ttft_s.p99)
    return (
        f"{OURS}: mean TTFT {change(ours.ttft_s.mean, mean.ttft_s.mean)} against the best other ({mean.policy}), "
        f"p99 {change(ours.ttft_s.p99, p99.ttft_s.p99)} ({p99.policy}); "
        f"predicted TTFT is off by {ours.ttft_error:.0%} (median)."
    )


def change(ours: float, others: float) -> str:
    return f"{ours / others - 1:+.1%}"


def sweep(cases: Sequence[Case], reports: Reports) -> Iterator[str]:
    yield "## Where the knee is: TTFT by rate"
    yield ""
    yield "Mean / p99, in seconds."
    yield ""
    yield "| policy | " + " | ".join(f"{case.rate:g}" for case in cases) + " |"
    yield "|---|" + "---:|" * len(cases)
    for policy in POLICIES:
        latencies = [reports[Run(case, policy)].ttft_s for case in cases]
        yield (
            f"| {policy} | "
            + " | ".join(f"{three_digits(one.mean)} / {three_digits(one.p99)}" for one in latencies)
            + " |"
        )
    yield ""


def seeds(reports: Reports) -> Iterator[str]:
    yield f"## How much chance there is: rate {AT:g}, seeds {', '.join(map(str, SEEDS))}"
    yield ""
    yield "The seed decides between equals, and what noise there is in measurements."
    yield ""
    yield "| policy | TTFT mean, s | TTFT p99, s |"
    yield "|---|---:|---:|"
    for policy in POLICIES:
        latencies = [reports[Run(Case(AT, seed=seed), policy)].ttft_s for seed in SEEDS]
        yield f"| {policy} | {span(one.mean for one in latencies)} | {span(one.p99 for one in latencies)} |"
    yield ""


def tiered(reports: Reports) -> Iterator[str]:
    yield f"## Tiers below HBM: rates {', '.join(f'{rate:g}' for rate in TIERED_RATES)}"
    yield ""
    yield TIERS
    yield ""
    yield "| below HBM | rate | hit rate | HBM / DDR / SSD, % | TTFT, s | ITL, ms | restored, TB | to SSD, TB |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for case in TIERED:
        yield tiered_row(case, reports[Run(case, OURS)])
    yield ""
    yield TIERS_MEANING
    yield ""


def tiered_row(case: Case, report: Report) -> str:
    uses = report.tiers
    cells = (
        name_of(case.tiers),
        f"{case.rate:g}",
        f"{report.hit_rate:.1%}",
        " / ".join(f"{100 * report.hit_rate_by_tier[tier]:.1f}" for tier in TIER_NAMES),
        report.ttft_s.shown(between=" / "),
        report.itl_s.shown(1000, " / "),
        f"{sum(use.restored_bytes for use in uses.values()) / 1e12:.2f}",
        f"{uses['ssd'].stored_bytes / 1e12:.1f}" if "ssd" in uses else "0",
    )
    return "| " + " | ".join(cells) + " |"


def name_of(tiers: TierSizes | None) -> str:
    if tiers is None:
        return "nothing"
    ssd = f" + SSD {tiers.ssd_bytes / 2**40:g} TiB" if tiers.ssd_bytes else ""
    return f"DDR {tiers.ddr_bytes / 2**30:g} GiB{ssd}"


def span(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{three_digits(ordered[0])} to {three_digits(ordered[-1])}"


def head(trace: Sequence[TraceRequest]) -> str:
    case, count = Case(1.0), len(trace)
    profile = load_profile(case.profile)
    capacity = case.prefill * profile.prefill.kv_blocks + case.decode * profile.decode.kv_blocks
    return HEAD.format(
        requests=count,
        prompt=sum(request.prompt_tokens for request in trace) / count,
        output=sum(request.output_tokens for request in trace) / count,
        per_s=count / max(trace[-1].arrival_s, 1.0),
        capacity=capacity / len({block for request in trace for block in request.block_ids}),
        bound=hit_rate_max(trace),
    )


def main(
    trace: Annotated[Path, typer.Argument(help="Mooncake's conversation trace, a JSON object a line")],
    jobs: Annotated[int, typer.Option(min=1, help="Replays at a time")] = os.cpu_count() or 1,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the trace's first ones, for a quick look")] = None,
) -> None:
    """Print the tables as Markdown."""
    read = read_trace(trace, requests)
    page = sections()
    runs = list(dict.fromkeys(Run(case, policy) for part in page for case in part.cases for policy in part.policies))
    reports = {}
    with ProcessPoolExecutor(jobs) as pool, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("replays", total=len(runs))
        for run, report in zip(runs, pool.map(replay, runs, [read] * len(runs)), strict=True):
            reports[run] = report
            progress.advance(task)
    print(head(read))
    for part in page:
        print("\n".join(part.lines(reports)))


if __name__ == "__main__":
    typer.run(main)
