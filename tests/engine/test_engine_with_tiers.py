"""Engines over real tiers, DDR and SSD, with real I/O threads: the same tokens as without."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from time import monotonic

import pytest
import torch
from engine_driver import EngineDriver
from tiny_models import make_model, random_prompt

from baton.errors import SettingsError
from baton.layout import PROBE_BLOCKS, KVLayout
from baton.settings import WorkerSettings
from engine.core import LocalEngine
from engine.device_copier import DeviceCopier
from engine.device_region import DeviceRegion
from engine.interface import ModelInfo
from engine.model.loader import LoadedModel, load_model
from engine.opening import open_engine
from engine.runner import ModelRunner, StepLogits, kv_layout
from engine.sampler import sample
from engine.scheduler import Limits
from engine.sequence import root_of
from engine.tiers import LateCosts, open_lower_tiers
from kvcache.block_hash import block_hashes

BLOCK_TOKENS = 8
POOL_BLOCKS = 40
WAIT_S = 60.0
pytestmark = pytest.mark.usefixtures("patient_restores")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = make_model("llama", tmp_path_factory.mktemp("llama"))
    return load_model(str(directory), device="cpu", dtype="float32")


OPTIONS = {"kv_blocks": POOL_BLOCKS, "block_tokens": BLOCK_TOKENS, "chunk_tokens": 32}


class Driver(EngineDriver):
    """Waits for wake-ups where there is nothing else to do."""

    def __init__(self, engine: LocalEngine[StepLogits]) -> None:
        torch.set_num_threads(1)
        super().__init__(engine)
        self._woken = threading.Event()
        self.engine.set_wake(self._woken.set)

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline_s = monotonic() + WAIT_S
        while not is_so():
            assert monotonic() < deadline_s
            if self.engine.has_work:
                self.step()
            else:
                self._woken.wait(min(0.05, self.engine.patience_s or 0.05))
                self._woken.clear()


@pytest.fixture
def opened(loaded: LoadedModel) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def make(**settings: object) -> Driver:
        drivers.append(Driver(open_engine(loaded, WorkerSettings(**{**OPTIONS, **settings}))))  # type: ignore[arg-type]
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.engine.close()


def block_bytes(loaded: LoadedModel) -> int:
    return kv_layout(loaded, BLOCK_TOKENS, 1).block_bytes


def replay(driver: Driver, seed: int, requests: int = 60) -> dict[str, list[int]]:
    """Prompts with shared prefixes, of which a tenth or so fits into the pool."""
    random = Random(seed)
    prefixes = [random_prompt(random.randrange(60, 120), seed=100 * seed + i) for i in range(30)]
    for number in range(requests):
        prompt = (*random.choice(prefixes), *random_prompt(random.randrange(1, 12), seed=number))
        name = driver.add(f"r{number}", prompt, max_tokens=random.randrange(1, 7))
        if random.random() < 0.1:
            driver.engine.abort(name)
            continue
        if random.random() < 0.7:
            driver.until(lambda name=name: name in driver.ended)  # type: ignore[misc]
    driver.until(lambda: not driver.engine.stats().running_sequences + driver.engine.stats().waiting_sequences)
    return {str(name): tokens for name, tokens in driver.outputs.items() if name in driver.ended}


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_of_an_engine_without_tiers(
    opened: Callable[..., Driver], loaded: LoadedModel, tmp_path: Path, seed: int
) -> None:
    ddr_bytes, ssd_bytes = 60 * block_bytes(loaded), 500 * block_bytes(loaded)
    tiered = opened(ddr_bytes=ddr_bytes, ssd_dir=tmp_path, ssd_bytes=ssd_bytes)
    plain = opened()
    tokens = replay(tiered, seed)
    assert tokens == replay(plain, seed)
    hits = tiered.engine.stats().tier_hits_tokens
    assert hits["ddr"] > 0
    assert tiered.engine.stats().prefix_hits_tokens > plain.engine.stats().prefix_hits_tokens
    tiers = tiered.engine.tiers
    assert tiers is not None and tiers.corrupt_blocks == 0


def test_tiers_are_asked_for_or_there_are_none(opened: Callable[..., Driver]) -> None:
    assert opened().engine.tiers is None
    assert opened(ddr_bytes=2**24, prefix_cache=False).engine.tiers is None


def test_too_little_memory_for_a_block_is_said(opened: Callable[..., Driver]) -> None:
    with pytest.raises(SettingsError, match="ddr_bytes"):
        opened(ddr_bytes=1000)


def test_what_the_engine_was_killed_with_is_found_on_the_ssd(
    opened: Callable[..., Driver], loaded: LoadedModel, tmp_path: Path
) -> None:
    sizes = {"ddr_bytes": 20 * block_bytes(loaded), "ssd_dir": tmp_path, "ssd_bytes": 500 * block_bytes(loaded)}
    first = opened(**sizes)
    tokens = replay(first, seed=5, requests=30)
    first.until(lambda: any(state.tier == "ssd" and state.blocks for state in first.engine.tiers.states()))  # type: ignore[union-attr]
    first.engine.tiers.close()  # type: ignore[union-attr]
    again = opened(**sizes)
    again.until(lambda: any(state.tier == "ssd" and state.blocks for state in again.engine.tiers.states()))  # type: ignore[union-attr]
    assert replay(again, seed=5, requests=30) == tokens
    assert again.engine.stats().tier_hits_tokens.get("ssd", 0) > 0


@pytest.mark.parametrize("was_below", [False, True])
def test_what_was_cleared_stays_away(
    opened: Callable[..., Driver], loaded: LoadedModel, tmp_path: Path, *, was_below: bool
) -> None:
    driver = opened(ddr_bytes=60 * block_bytes(loaded), ssd_dir=tmp_path, ssd_bytes=500 * block_bytes(loaded))
    tiers = driver.engine.tiers
    assert tiers is not None

    def push(seed: int) -> None:
        filler = driver.add(f"filler-{seed}", random_prompt(BLOCK_TOKENS * (POOL_BLOCKS - 1), seed=seed), max_tokens=2)
        driver.until(lambda: filler in driver.ended and not driver.engine.has_work)

    prompt = random_prompt(100, seed=1)
    asked = driver.add("asked", prompt)
    driver.until(lambda: asked in driver.ended)
    if was_below:
        push(98)
    names = block_hashes(root_of(driver.engine.model, ""), prompt, BLOCK_TOKENS)
    assert all(tiers.tier_of(name) for name in names) and (tiers.tier_of(names[0]) != "hbm") == was_below
    driver.engine.clear_cache(None)
    push(99)
    push(100)
    assert not any(tiers.tier_of(name) for name in names)


# ---- device memory, as far as the CPU device can stand for it


def device_engine(loaded: LoadedModel, settings: WorkerSettings) -> LocalEngine[StepLogits]:
    layout = kv_layout(loaded, BLOCK_TOKENS, POOL_BLOCKS + PROBE_BLOCKS)
    region = DeviceRegion(layout, torch.device("cpu"))
    model = ModelInfo("tiny", "tiny", POOL_BLOCKS * BLOCK_TOKENS, 211, frozenset({1}), layout)
    return LocalEngine(
        model,
        region,
        ModelRunner(loaded, region),
        lambda logits, draws: sample(logits.logits, draws),
        Limits.of(settings),
        digester=region.digester,
        tiers=open_lower_tiers(settings, model, region, LateCosts()),
    )


def test_a_device_region_has_tiers_too(opened: Callable[..., Driver], loaded: LoadedModel) -> None:
    settings = WorkerSettings(**OPTIONS, ddr_bytes=500 * block_bytes(loaded))  # type: ignore[arg-type]
    engine = device_engine(loaded, settings)
    try:
        assert replay(Driver(engine), seed=7) == replay(opened(), seed=7)
        assert engine.stats().tier_hits_tokens["ddr"] > 0
        assert engine.tiers is not None and engine.tiers.corrupt_blocks == 0
    finally:
        engine.close()


def test_the_device_copier_moves_rows_as_the_tiers_keep_them() -> None:
    layout = KVLayout(3, 12, 4, 2, 8, "bfloat16")
    region = DeviceRegion(layout, torch.device("cpu"))
    region.tensor.copy_(torch.randn(layout.shape).to(torch.bfloat16))
    before = region.tensor.clone()
    rows = torch.zeros((5, layout.block_bytes + 64), dtype=torch.uint8)
    copier = DeviceCopier(region)
    blocks, slots = [7, 2, 3], [4, 0, 1]
    copier.gather(blocks, rows.numpy(), slots)  # type: ignore[arg-type]
    for block, slot in zip(blocks, slots, strict=True):
        row = before[:, :, block].contiguous().view(torch.uint8).flatten()
        assert torch.equal(rows[slot, : layout.block_bytes], row)
    assert not rows[[2, 3]].any() and not rows[:, layout.block_bytes :].any()
    region.tensor.zero_()
    copier.scatter(range(1), rows.numpy(), slots, [1, 9, 5])  # type: ignore[arg-type]
    assert torch.equal(region.tensor[0, :, [1, 9, 5]], before[0, :, [7, 2, 3]])
    assert not region.tensor[1:].any()
    copier.scatter(range(1, 3), rows.numpy(), slots, [1, 9, 5])  # type: ignore[arg-type]
    assert torch.equal(region.tensor[:, :, [1, 9, 5]], before[:, :, [7, 2, 3]])
    untouched = [block for block in range(12) if block not in (1, 9, 5)]
    assert not region.tensor[:, :, untouched].any()
