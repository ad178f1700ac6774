"""Replays with tiers below HBM: the real store finds what HBM had to give up, and never slows anybody down."""

from dataclasses import replace

import pytest

from baton.errors import SettingsError
from baton.latency import DecodeCost, PrefillCost, TransferCost, WorkerLatency
from simulator.profile import Profile, RoleProfile, TierProfile, TierSpeed, load_profile, shipped_profiles
from simulator.replay import Replay, Scenario
from simulator.report import Report
from simulator.tiers.worker_tiers import TierSizes, block_bytes_of
from simulator.trace import TRACE_BLOCK_TOKENS, TraceRequest, hit_rate_max
from simulator.workloads import Conversations

ROLE = RoleProfile(kv_blocks=60, chunk_tokens=2048, sequences_max=64)


def both(bytes_per_s: float) -> TierSpeed:
    cost = TransferCost(latency_s=0.0001, bytes_per_s=bytes_per_s)
    return TierSpeed(restore=cost, store=cost)


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
    prefill=ROLE,
    decode=ROLE,
    tiers=TierProfile(ddr=both(1e9), ssd=both(2e8), bytes_in_flight_max=20_000_000),
    message_s=0.0005,
    event_s=0.01,
)
BLOCK_BYTES = block_bytes_of(PROFILE)
CONVERSATIONS = Conversations(starts_per_s=0.3, system_tokens=1024, output_tokens=30, pause_s=120).trace(200, seed=5)
LARGE = TierSizes(ddr_bytes=3000 * BLOCK_BYTES)
BOTH = TierSizes(ddr_bytes=100 * BLOCK_BYTES, ssd_bytes=3000 * BLOCK_BYTES)
SMALL = TierSizes(ddr_bytes=40 * BLOCK_BYTES, ssd_bytes=60 * BLOCK_BYTES)


def scenario(tiers: TierSizes | None, **changes: object) -> Scenario:
    return replace(Scenario(PROFILE, prefill=1, decode=1, tiers=tiers), **changes)  # type: ignore[arg-type]


def run(tiers: TierSizes | None, trace: list[TraceRequest] = CONVERSATIONS, **changes: object) -> Report:
    return Replay(trace, scenario(tiers, **changes), "least-added-latency").run()


@pytest.mark.parametrize("tiers", [LARGE, BOTH, SMALL])
def test_every_request_is_served_and_no_tier_is_over_its_limit(tiers: TierSizes) -> None:
    replay = Replay(CONVERSATIONS, scenario(tiers, prefill=2, decode=2), "least-added-latency")
    report = replay.run()
    assert report.refused == 0
    assert set(report.tiers) == ({"ddr", "ssd"} if tiers.ssd_bytes else {"ddr"})
    for use in report.tiers.values():
        assert 0 < use.held_bytes_max <= use.limit_bytes
        assert use.restored_bytes > 0
    for worker in (*(one.worker for one in replay.prefill), *(one.worker for one in replay.decode)):
        assert worker.tiers is not None and worker.tiers.store.is_settled
        worker.tiers.store.check_integrity()
        worker.scheduler.check_integrity([])
        assert worker.scheduler.pool.used == 0 and not worker.scheduler.cache.restoring
    assert report.hit_rate == pytest.approx(sum(report.hit_rate_by_tier.values()))


def test_tiers_fill_up_to_their_limits() -> None:
    for use in run(SMALL).tiers.values():
        assert use.held_bytes_max > 0.8 * use.limit_bytes


def test_large_tiers_come_to_the_bound_and_save_time() -> None:
    """Of the only prefill worker; what the decode worker computes itself may have been computed here before."""
    none, ddr, ssd = run(None), run(LARGE), run(BOTH)
    bound = hit_rate_max(CONVERSATIONS)
    assert none.hit_rate < 0.75 * bound
    assert ddr.hit_rate > 0.95 * bound and ssd.hit_rate > 0.95 * bound
    assert ddr.hit_rate <= bound and ssd.hit_rate <= bound
    assert ddr.ttft_s.mean < 0.8 * none.ttft_s.mean
    assert ssd.ttft_s.mean < 0.9 * none.ttft_s.mean
    assert none.hit_rate_by_tier["ddr"] == 0 < ddr.hit_rate_by_tier["ddr"]
    assert ddr.hit_rate_by_tier["ssd"] == 0 < ssd.hit_rate_by_tier["ssd"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tiers", [LARGE, BOTH, SMALL])
def test_it_is_never_slower_than_without(tiers: TierSizes, seed: int) -> None:
    none, below = run(None, seed=seed), run(tiers, seed=seed)
    assert below.ttft_s.mean < 1.03 * none.ttft_s.mean
    assert below.e2e_s.mean < 1.03 * none.e2e_s.mean
    assert below.hit_rate > 0.97 * none.hit_rate


def test_the_same_seed_gives_the_same_result() -> None:
    assert run(SMALL) == run(SMALL)
    assert run(SMALL) != run(SMALL, seed=1)


def test_jumps_come_to_the_same_as_their_steps_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiers that need drop nothing, and measurements without noise: no dice are thrown."""
    monkeypatch.setattr("simulator.worker.NOISE", 0.0)
    jumped = Replay(CONVERSATIONS[:80], scenario(LARGE), "round-robin")
    jumped.run()
    monkeypatch.setattr("simulator.engine.steps_alike", lambda *_: 1)
    stepped = Replay(CONVERSATIONS[:80], scenario(LARGE), "round-robin")
    stepped.run()
    assert [job.cached_tokens for job in jumped.jobs] == [job.cached_tokens for job in stepped.jobs]
    assert [job.restored for job in jumped.jobs] == [job.restored for job in stepped.jobs]
    assert any(job.restored for job in jumped.jobs)
    for what in ("ttft_s", "e2e_s"):
        times = [[getattr(job, what) for job in replay.jobs] for replay in (jumped, stepped)]
        assert times[0] == pytest.approx(times[1], rel=1e-6), what


def test_without_tiers_nothing_has_changed() -> None:
    """As it was before there were any, to the last digit."""
    report = run(None)
    assert report.tiers == {}
    assert report.hit_rate == 0.41265822784810124
    assert (report.ttft_s.mean, report.itl_s.mean) == (0.09235060493568437, 0.010434117524658507)


def test_a_tier_slower_than_computing_is_not_used() -> None:
    """0.1 GB/s for blocks of 67 MB, which an H100 computes in 11 ms."""
    fast = load_profile("h100-8b").with_kv_blocks(60)
    assert fast.tiers is not None
    slow_speeds = fast.tiers.model_copy(update={"ddr": both(1e8), "ssd": both(1e8)})
    tiers = TierSizes(ddr_bytes=2**36, ssd_bytes=2**38)
    slow, quick, none = (
        run(sizes, profile=profile, prefill=1, decode=2)
        for profile, sizes in ((fast.model_copy(update={"tiers": slow_speeds}), tiers), (fast, tiers), (fast, None))
    )
    assert all(use.restored_bytes == 0 for use in slow.tiers.values())
    assert quick.tiers["ddr"].restored_bytes > 0
    assert slow.hit_rate == pytest.approx(none.hit_rate, abs=0.02)


def test_a_prompt_that_was_evicted_comes_up_again_as_fast_as_its_tier() -> None:
    """And the router foresees it."""
    blocks = tuple(range(40))
    again = [TraceRequest(at_s, 40 * TRACE_BLOCK_TOKENS - 1, 3, blocks) for at_s in (0.0, 60.0)]
    others = [TraceRequest(10.0 * n, 50 * TRACE_BLOCK_TOKENS, 3, tuple(range(n * 100, n * 100 + 50))) for n in (1, 2)]
    trace = sorted([*again, *others], key=lambda request: request.arrival_s)
    replay = Replay(trace, scenario(LARGE), "round-robin")
    replay.run()
    first, last = replay.jobs[0], replay.jobs[-1]
    assert last.restored == {"ddr": 39} and last.cached_tokens == 39 * TRACE_BLOCK_TOKENS
    assert first.ttft_s > 10 * last.ttft_s
    assert PROFILE.tiers is not None
    restore_s = PROFILE.tiers.ddr.restore.time_s(39 * BLOCK_BYTES)
    rest_s = PROFILE.latency.prefill.prompt_time_s(511, 39 * TRACE_BLOCK_TOKENS, 2048)
    transfer_s = PROFILE.latency.transfer.time_s(BLOCK_BYTES)
    assert restore_s < last.ttft_s < restore_s + rest_s + transfer_s + 0.01
    assert last.predicted_ttft_s == pytest.approx(last.ttft_s, rel=0.35)


def test_a_crowd_at_the_disk_gives_up_and_computes() -> None:
    """All come at once for what lies on an SSD that is only a little quicker than computing."""
    role = ROLE.model_copy(update={"kv_blocks": 200})
    near = TierProfile(ddr=both(1e9), ssd=both(3e7), bytes_in_flight_max=20_000_000)
    profile = PROFILE.model_copy(update={"tiers": near, "prefill": role, "decode": role})
    prompts = [tuple(range(100 * n, 100 * n + 20)) for n in range(20)]
    first = [TraceRequest(5.0 * n, 20 * TRACE_BLOCK_TOKENS, 40, ids) for n, ids in enumerate(prompts)]
    crowd = [TraceRequest(200.0, 20 * TRACE_BLOCK_TOKENS, 40, ids) for ids in prompts[:8]]
    tiers = TierSizes(ddr_bytes=20 * BLOCK_BYTES, ssd_bytes=1000 * BLOCK_BYTES)
    replays = [Replay([*first, *crowd], scenario(sizes, profile=profile), "round-robin") for sizes in (tiers, None)]
    below, none = (replay.run() for replay in replays)
    jobs = replays[0].jobs[-8:]
    assert any(job.restored.get("ssd", 0) >= 19 for job in jobs), "some came up"
    assert any(job.cached_tokens < 19 * TRACE_BLOCK_TOKENS for job in jobs), "some were computed"
    assert all(job.refused is None for job in jobs)
    assert below.ttft_s.mean < 1.03 * none.ttft_s.mean
    for worker in (replays[0].prefill[0].worker, replays[0].decode[0].worker):
        worker.scheduler.check_integrity([])


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_know_their_tiers(name: str) -> None:
    profile = load_profile(name)
    assert profile.tiers is not None
    block_s = profile.latency.prefill.token_s * TRACE_BLOCK_TOKENS
    for tier in (profile.tiers.ddr, profile.tiers.ssd):
        assert tier.restore.time_s(block_bytes_of(profile)) < 1.2 * block_s, "worth it"


def test_tiers_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingsError, match="needs host memory"):
        TierSizes(0, 10**12)
    with pytest.raises(SettingsError, match="no room for one KV block"):
        scenario(TierSizes(100))
    with pytest.raises(SettingsError, match="how fast"):
        scenario(LARGE, profile=PROFILE.model_copy(update={"tiers": None}))
