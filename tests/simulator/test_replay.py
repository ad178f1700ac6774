"""Replays of small traces: what goes in comes out, twice the same, and the real router learns what it should."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from baton.errors import SettingsError
from baton.latency import DecodeCost, PrefillCost, TransferCost, WorkerLatency
from baton.settings import Policy
from simulator.line import Admission
from simulator.profile import Profile, RoleProfile, load_profile, shipped_profiles
from simulator.replay import Replay, Scenario
from simulator.report import Report
from simulator.trace import TRACE_BLOCK_TOKENS, TraceRequest, at_rate, hit_rate_max, made_unique, write_trace
from simulator.workloads import Conversations, Strangers

PROFILE = Profile(
    model="small",
    layers=4,
    context_length=100_000,
    kv_token_bytes=1000,
    latency=WorkerLatency(
        PrefillCost(chunk_s=0.005, token_s=5e-5, token_context_s=1e-9),
        DecodeCost(step_s=0.01, sequence_s=1e-4, kv_token_s=1e-7),
        TransferCost(latency_s=0.001, bytes_per_s=1e9),
    ),
    prefill=RoleProfile(kv_blocks=200, chunk_tokens=2048, sequences_max=64),
    decode=RoleProfile(kv_blocks=200, chunk_tokens=512, sequences_max=64),
    message_s=0.0005,
    event_s=0.01,
)
POLICIES: tuple[Policy, ...] = get_args(Policy)
CONVERSATIONS = Conversations(starts_per_s=1.0, system_tokens=1024, output_tokens=60).trace(250, seed=5)


def scenario(**changes: object) -> Scenario:
    return replace(Scenario(PROFILE, prefill=2, decode=2), **changes)  # type: ignore[arg-type]


def run(trace: list[TraceRequest], policy: Policy = "least-added-latency", **changes: object) -> Report:
    return Replay(trace, scenario(**changes), policy).run()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_served_and_nothing_leaks(policy: Policy) -> None:
    replay = Replay(CONVERSATIONS, scenario(), policy)
    report = replay.run()
    assert (report.policy, report.requests, report.refused) == (policy, 250, 0)
    assert 0 < report.hit_rate <= hit_rate_max(CONVERSATIONS)
    for worker in (*(one.worker for one in replay.prefill), *(one.worker for one in replay.decode)):
        worker.scheduler.check_integrity([])
        assert worker.scheduler.pool.used == 0
    for job in replay.jobs:
        assert job.request.arrival_s < (job.first_token_s or 0) <= job.end_s
    assert replay.router.placed == {}


def test_the_same_seed_gives_the_same_result() -> None:
    assert run(CONVERSATIONS, "random") == run(CONVERSATIONS, "random") != run(CONVERSATIONS, "random", seed=1)
    assert run(CONVERSATIONS) == run(CONVERSATIONS)


def test_one_request_alone_takes_the_sum_of_its_parts() -> None:
    """A prompt of 4,000 tokens in two chunks, streamed to a decode worker meanwhile."""
    report = run([TraceRequest(0.0, 4000, 3, tuple(range(8)))])
    latency = PROFILE.latency
    prefill_s = latency.prefill.prompt_time_s(4000, 0, 2048)
    last_chunk_bytes = (4000 - 2048) * PROFILE.kv_token_bytes
    exposed_s = last_chunk_bytes / PROFILE.layers / latency.transfer.bytes_per_s + latency.transfer.latency_s
    ttft_s = 3 * PROFILE.message_s + prefill_s + exposed_s
    assert report.local_prefills == 0
    assert report.ttft_s.mean == pytest.approx(ttft_s)
    gaps_s = latency.decode.step_time_s(1, 4001), latency.decode.step_time_s(1, 4002)
    assert report.itl_s.mean == pytest.approx(sum(gaps_s) / 2)
    assert report.e2e_s.mean == pytest.approx(ttft_s + sum(gaps_s))
    assert report.ttft_error < 0.1


def test_a_prompt_sent_again_is_not_computed_again() -> None:
    blocks = tuple(range(8))
    first, again = TraceRequest(0.0, 4000, 3, blocks), TraceRequest(5.0, 4000, 3, blocks)
    report = run([first, again])
    assert report.hit_rate == 7 / 16, "all whole blocks of the second"
    assert report.hit_rate_by_tier == {"hbm": 7 / 16, "ddr": 0, "ssd": 0}
    assert run(made_unique([first, again])).hit_rate == 0


def test_prompts_that_no_worker_can_hold_are_refused() -> None:
    too_long = TraceRequest(0.0, 250 * TRACE_BLOCK_TOKENS, 3, tuple(range(250)))
    report = run([too_long, TraceRequest(1.0, 100, 3, (1000,))])
    assert (report.requests, report.refused) == (2, 1)


def test_a_slowed_worker_is_avoided() -> None:
    """Nobody tells the router: it learns from what the worker measures of itself."""
    trace = Strangers(arrivals_per_s=6.0, prompt_tokens=3000, output_tokens=60).trace(400, seed=2)
    shares = []
    for slowdown in ({}, {"prefill-0": 3.0}):
        replay = Replay(trace, scenario(slowdown=slowdown), "least-added-latency")
        replay.run()
        later = [job for job in replay.jobs[100:] if job.prefill_worker]
        shares.append(sum(job.prefill_worker == "prefill-0" for job in later) / len(later))
    assert 0.4 < shares[0] < 0.6
    assert shares[1] < 0.3


def test_least_added_latency_beats_what_knows_nothing() -> None:
    ours, theirs = (run(at_rate(CONVERSATIONS, 2.0), policy).ttft_s for policy in ("least-added-latency", "random"))
    assert ours.mean < 0.8 * theirs.mean


def test_a_deadline_refuses_what_would_come_too_late() -> None:
    trace = Strangers(arrivals_per_s=30.0, prompt_tokens=5000, output_tokens=60).trace(300, seed=2)
    open_door = run(trace)
    assert open_door.refused == 0
    report = run(trace, admission=Admission(worker_queue_s=0.5, deadline_s=2.0))
    assert 0 < report.refused < 300
    assert report.ttft_s.p99 < open_door.ttft_s.p99 / 2


def test_admission_lets_all_through_where_there_is_room() -> None:
    assert run(CONVERSATIONS, admission=Admission()).refused == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decode": 0}, "at least one decode worker"),
        ({"slowdown": {"decode-9": 3.0}}, "There is no worker decode-9"),
        ({"slowdown": {"decode-0": 0.0}}, "positive factor"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        scenario(**changes)


@pytest.mark.parametrize("name", ["h100-8b", "h100-70b"])
def test_shipped_profiles_can_be_used(name: str) -> None:
    assert name in shipped_profiles()
    profile = load_profile(name)
    report = Replay(CONVERSATIONS[:20], Scenario(profile, 1, 1), "least-added-latency").run()
    assert report.refused == 0 and report.ttft_s.mean > 0


def test_a_profile_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="h100-8b"):
        load_profile("h200-8b")
    for text in ("[not a mapping", "model: only", "- a list"):
        path = tmp_path / "profile.yaml"
        path.write_text(text)
        with pytest.raises(SettingsError, match=r"profile\.yaml"):
            load_profile(str(path))
    with pytest.raises(SettingsError, match="2 KV blocks"):
        PROFILE.with_kv_blocks(1)
    assert PROFILE.with_kv_blocks(50).decode.kv_blocks == 50


def test_neither_torch_nor_a_server_is_imported(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.jsonl", CONVERSATIONS[:10])
    code = (
        "import sys; from launcher.cli import run;"
        f"run(['replay', {str(tmp_path / 'trace.jsonl')!r}, '--profile', 'h100-8b', '--json']);"
        "heavy = {'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["requests"] == 10
