"""What tiers cost a step: the figures, and a turn of an engine in this process."""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from baton.settings import WorkerSettings
from bench.models import Shape, make_model
from bench.tiers import steps
from bench.tiers.steps import StepTime, TurnTimes, _cost, _turn
from engine.opening import load_engine

SHAPE = Shape(layers=2, hidden=64, intermediate=64, heads=4, kv_heads=2, vocabulary=500)


def turn(prefill: Sequence[float], decode: Sequence[float], cpu_share: float = 0.5) -> TurnTimes:
    return TurnTimes([StepTime(s, cpu_share * s) for s in prefill], [StepTime(s, cpu_share * s) for s in decode])


def test_a_ratio_is_of_the_same_step_with_and_without() -> None:
    plain = [turn([1.0, 4.0], [0.1]), turn([2.0, 8.0], [0.4])]
    tiered = [turn([1.1, 4.4], [0.1]), turn([2.0, 8.8], [0.2], cpu_share=0.6)]
    pair = list(zip(plain, tiered, strict=True))
    cost = _cost("prefill", "idle", [pair])
    assert (cost.step_ms, cost.plain_step_ms) == (pytest.approx(3200), pytest.approx(3000))
    assert (cost.of_plain, cost.cpu_of_plain) == (pytest.approx(1.1), pytest.approx(1.15))
    assert _cost("decode", "offload", [pair]).of_plain == pytest.approx(0.75)


def test_each_pair_of_engines_counts_once() -> None:
    pairs = [[(turn([1.0], []), turn([ratio], []))] * repeats for ratio, repeats in ((0.9, 9), (1.1, 1), (1.2, 2))]
    cost = _cost("prefill", "idle", pairs)
    assert cost.of_plain == pytest.approx(1.1)
    assert (cost.of_plain_least, cost.of_plain_most) == (pytest.approx(0.9), pytest.approx(1.2))


def test_a_turn_times_full_chunks_and_full_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"PREFILL_TOKENS": 256, "CHUNK_TOKENS": 64, "DECODE_CONTEXT": 40, "DECODE_STEPS": 6}
    for name, value in sizes.items():
        monkeypatch.setattr(steps, name, value)
    monkeypatch.setattr(steps, "IDLE_WAIT_S", 0.01)
    make_model(tmp_path, SHAPE)
    settings = WorkerSettings(  # type: ignore[call-arg] # the others have defaults
        model=str(tmp_path), threads=1, kv_blocks=100, chunk_tokens=64, ddr_bytes=2**22
    )
    engine = load_engine(settings)
    try:
        for seed in range(2):
            times = _turn(engine, Random(seed), SHAPE.vocabulary)
            assert (len(times.prefill), len(times.decode)) == (4, 6)
            assert all(time.wall_s > 0 and time.cpu_s > 0 for time in (*times.prefill, *times.decode))
        assert not engine.stats().running_sequences
    finally:
        engine.close()
