"""`baton replay` as a command: figures as JSON or a table, a chart, and mistakes as sentences."""

import json
from pathlib import Path

import pytest

from launcher.cli import run
from simulator.trace import write_trace
from simulator.workloads import Conversations


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    write_trace(path, Conversations().trace(40, seed=1))
    return path


def replay(trace: Path, *options: str) -> int:
    return run(["replay", str(trace), "--profile", "h100-8b", *options])


def test_one_policy_is_one_object(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(trace, "--json", "--rate", "2", "--prefill", "2", "--decode", "2") == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert (report["policy"], report["requests"], report["refused"]) == ("least-added-latency", 40, 0)
    assert set(report["hit_rate_by_tier"]) == {"hbm", "ddr", "ssd"}
    for latency in ("ttft_s", "itl_s", "e2e_s"):
        assert 0 < report[latency]["p50"] <= report[latency]["p99"]
        assert report[latency]["mean"] > 0
    assert 0 < report["prefill_utilisation"] < 1
    assert 0 < report["decode_utilisation"] < 1
    assert out.err == "", "no progress bar where nobody looks"


def test_several_policies_are_a_list(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(trace, "--json", "--policy", "round-robin, block-cost,round-robin", "--requests", "10") == 0
    assert [(r["policy"], r["requests"]) for r in json.loads(capsys.readouterr().out)] == [
        ("round-robin", 10),
        ("block-cost", 10),
    ]


def test_otherwise_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(trace, "--policy", "least-loaded,random", "--unique", "--slow", "decode-0=3") == 0
    out = capsys.readouterr().out
    assert "least-loaded" in out and "random" in out and "0.0%" in out


def test_options_reach_the_simulation(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = []
    for options in ((), ("--kv-blocks", "40"), ("--seed", "7", "--policy", "random"), ("--deadline", "0.001")):
        assert replay(trace, "--json", *options) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[1]["hit_rate"] < figures[0]["hit_rate"]
    assert figures[3]["refused"] > 0


def test_a_chart_is_drawn(trace: Path, tmp_path: Path) -> None:
    chart = tmp_path / "ttft.png"
    assert replay(trace, "--policy", "round-robin,random", "--plot", str(chart)) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--policy", "best"), 2, "There is no policy best; there are least-added-latency"),
        (("--policy", ","), 2, "Name a policy"),
        (("--profile", "nothing"), 2, "There is no profile nothing"),
        (("--rate", "0"), 2, "rate must be positive"),
        (("--decode", "0"), 2, "at least one decode worker"),
        (("--slow", "decode-0"), 2, "like decode-0=3"),
        (("--slow", "decode-7=3"), 2, "There is no worker decode-7"),
        (("--kv-blocks", "1"), 2, "KV blocks"),
        (("--deadline", "-1"), 2, "positive"),
        (("--ssd-bytes", "1TiB"), 2, "needs host memory"),
        (("--ddr-bytes", "much"), 2, "a size looks like"),
        (("--ddr-bytes", "1MiB"), 2, "no room for one KV block"),
        (("--plot", "/nowhere/at/all.png"), 1, "cannot be written"),
    ],
)
def test_a_mistake_is_a_sentence(
    trace: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], code: int, says: str
) -> None:
    assert replay(trace, *options) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


def test_a_bad_trace_is_named_with_its_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.write_text(trace.read_text() + '{"timestamp": 1}\n')
    assert replay(trace) == 1
    assert "Line 41 of the trace" in capsys.readouterr().err


def test_tiers_are_told_apart(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiers = ("--kv-blocks", "40", "--ddr-bytes", "8GiB", "--ssd-bytes", "0.5TiB")
    assert replay(trace, "--json", *tiers) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["tiers"]) == {"ddr", "ssd"}
    assert 0 < report["tiers"]["ddr"]["held_bytes_max"] <= report["tiers"]["ddr"]["limit_bytes"] <= 8 * 2**30
    assert report["hit_rate_by_tier"]["ddr"] > 0
    assert replay(trace, "--policy", "round-robin", *tiers) == 0
    out = capsys.readouterr().out
    assert "round-robin" in out and "restored, GB" in out and "ssd" in out
    assert replay(trace, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tiers"] == {}
