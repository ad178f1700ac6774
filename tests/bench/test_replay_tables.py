"""The page of replays: its cases can be replayed, and its tables say what the reports do."""

from dataclasses import replace

import pytest

from bench.replay import (
    OURS,
    POLICIES,
    TIERED,
    Case,
    Run,
    change,
    head,
    replay,
    requests_of,
    sections,
    span,
    sweep,
    tiered,
    titled,
)
from simulator.report import Spread, three_digits
from simulator.trace import hit_rate_max
from simulator.workloads import Conversations

TRACE = Conversations(starts_per_s=1.0).trace(60, seed=3)
CASE = Case(2.0, prefill=1, decode=2, slow="decode-0")
REPORTS = {Run(CASE, policy): replay(Run(CASE, policy), TRACE) for policy in POLICIES}


def test_a_table_has_a_row_for_each_policy_and_a_verdict() -> None:
    lines = list(titled("## A title", CASE, "Some words.").lines(REPORTS))
    assert lines[:4] == ["## A title", "", "Some words.", ""]
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == ["policy", *POLICIES]
    assert len({row.count("|") for row in rows}) == 1, "all as wide as the head"
    ours = REPORTS[Run(CASE, OURS)]
    assert f"{ours.hit_rate:.1%}" in rows[1] and ours.ttft_s.shown(between=" / ") in rows[1]
    assert any(line.startswith(f"{OURS}: mean TTFT") for line in lines)


def test_the_share_of_a_slow_worker_is_told() -> None:
    ours, blind = REPORTS[Run(CASE, OURS)], REPORTS[Run(CASE, "round-robin")]
    assert blind.placed_on("decode-0") == pytest.approx(0.5, abs=0.02)
    assert ours.placed_on("decode-0") < 0.4
    assert ours.placed_on("decode-0") + ours.placed_on("decode-1") == 1


def test_a_sweep_has_a_column_for_each_rate() -> None:
    lines = list(sweep([CASE], REPORTS))
    assert f"| policy | {CASE.rate:g} |" in lines
    assert sum(line.startswith("| ") for line in lines) == 1 + len(POLICIES)


def test_workloads_are_what_they_are_called() -> None:
    assert hit_rate_max(requests_of(Case(1.0, "unique"), TRACE)) == 0
    assert hit_rate_max(requests_of(Case(1.0, "strangers"), TRACE)) == 0
    assert hit_rate_max(requests_of(Case(1.0, "conversations"), TRACE)) > 0.5
    assert requests_of(Case(2.0), TRACE)[-1] == replace(TRACE[-1], arrival_s=TRACE[-1].arrival_s / 2)


def test_the_page_needs_every_case_once_and_says_what_it_replays() -> None:
    cases = [case for section in sections() for case in section.cases]
    assert {case.workload for case in cases} == {"trace", "unique", "conversations", "strangers"}
    assert f"**{hit_rate_max(TRACE):.1%}**" in head(TRACE)


def test_figures_have_three_digits() -> None:
    assert [three_digits(value) for value in (0.5, 1.0, 12.34, 123.4, 1234.5)] == [
        "0.500",
        "1.00",
        "12.3",
        "123",
        "1234",
    ]
    assert Spread(0.0005, 0.0123, 0.2).shown(1000) == "0.500/12.3/200"
    assert span([3.0, 1.0, 2.0]) == "1.00 to 3.00"
    assert change(1.02, 1.0) == "+2.0%"


def test_tiers_have_a_row_for_each_size_and_rate() -> None:
    reports = {Run(case, OURS): REPORTS[Run(CASE, OURS)] for case in TIERED}
    rows = [line for line in tiered(reports) if line.startswith("| ")]
    assert len(rows) == 1 + len(TIERED)
    assert len({row.count("|") for row in rows}) == 1, "all as wide as the head"
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1:5]] == [
        "nothing",
        "DDR 64 GiB",
        "DDR 256 GiB",
        "DDR 256 GiB + SSD 2 TiB",
    ]
