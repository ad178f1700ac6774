"""The store with real threads, host memory and a real file."""

import random
from pathlib import Path

import numpy as np
import pytest

from baton.errors import SettingsError
from baton.ids import tenant_tag
from kvcache.tiers.index.sweeps import rows_of
from kvcache.tiers.interface import Owner
from tests.kvcache.tiers.store_rig import OWNER, StoreRig
from tests.kvcache.tiers.store_world import chain


def test_what_goes_down_comes_back_bit_by_bit(tmp_path: Path) -> None:
    rig = StoreRig(tmp_path)
    prompts = [chain(number, *range(5)) for number in range(9)]
    rng = random.Random(3)
    for _ in range(120):
        rig.run(rng.choice(prompts)[: rng.randint(1, 6)])
        rig.store.check_integrity()
    rig.settle()
    states = {state.tier: state for state in rig.store.states()}
    assert rig.wrong == []
    assert rig.restored > 50
    assert states["ssd"].blocks > 0
    assert rig.store.corrupt_blocks == 0
    rig.close()


def test_a_prompt_returns_from_each_tier(tmp_path: Path) -> None:
    rig = StoreRig(tmp_path)
    first = chain(1, 2, 3, 4)
    rig.run(first)
    seen = set()
    for number in range(10, 26):
        rig.run(chain(number, 5, 6, 7))
        rig.settle()
        tiers = {rig.store.tier_of(name) for name in first}
        if len(tiers) == 1 and not tiers <= seen:
            seen |= tiers
    assert {"hbm", "ssd"} <= seen
    assert rig.store.locate(first) == ["ssd"] * 4
    assert rig.run(first) == 4
    assert rig.wrong == []
    rig.close()


def test_a_restarted_worker_finds_its_file_again(tmp_path: Path) -> None:
    rig = StoreRig(tmp_path)
    prompts = [chain(number, 1, 2, 3) for number in range(30)]
    for prompt in prompts:
        rig.run(prompt)
        rig.settle()
    on_disk = next(state.blocks for state in rig.store.states() if state.tier == "ssd")
    assert on_disk > 50
    rig.close()

    again = StoreRig(tmp_path)
    again.settle()
    assert next(state.blocks for state in again.store.states() if state.tier == "ssd") == on_disk
    assert sum(len(again.store.locate(prompt)) for prompt in prompts) > 30, "heads, but those that lay higher"
    found = [prompt for prompt in prompts if len(again.store.locate(prompt)) == 4]
    assert all(again.run(prompt) == 4 for prompt in found[:6])
    assert again.wrong == []
    again.store.check_integrity()
    again.close()


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    rig = StoreRig(tmp_path)
    prompts = [chain(number, 1, 2, 3) for number in range(20)]
    for prompt in prompts:
        rig.run(prompt)
        rig.settle()
    rig.close()
    other = StoreRig(tmp_path, fingerprint="another model")
    other.settle()
    assert sum(state.blocks for state in other.store.states()) == 0
    other.close()


def test_compressed_blocks_come_back_nearly(tmp_path: Path) -> None:
    rig = StoreRig(tmp_path, kv_compression="int8")
    for number in range(10, 40):
        rig.run(chain(number, 5, 6))
        rig.settle()
    rig.store.check_integrity()
    prompt = next(
        names for n in range(10, 40) if [*map(rig.store.tier_of, names := chain(n, 5, 6))] == ["ssd", "ssd", "ssd"]
    )
    assert rig.store.locate(prompt) == ["ssd"] * 3
    blocks = rig.pool.allocate(3)
    result = rig.store.restore(prompt, blocks).wait(10.0)
    assert result is not None and result.good == 3 and result.digests == ()
    got = np.stack([rig.region[:, :, block] for block in blocks]).view(np.float16).astype(np.float32)
    want = np.stack([rig.content(name) for name in prompt]).view(np.float16).astype(np.float32)
    assert float(np.abs(got - want).max()) < 0.05
    rig.pool.release(blocks)
    rig.settle()
    rig.close()


def test_a_flipped_bit_is_caught_and_the_block_forgotten(tmp_path: Path) -> None:
    rig = StoreRig(tmp_path)
    for number in range(10, 40):
        rig.run(chain(number, 5, 6))
        rig.settle()
    prompt = next(
        names for n in range(10, 40) if [*map(rig.store.tier_of, names := chain(n, 5, 6))] == ["ssd", "ssd", "ssd"]
    )
    file = next(tmp_path.glob("*.slots"))
    data = bytearray(file.read_bytes())
    needle = rig.content(prompt[1]).tobytes()
    at = data.index(needle)
    with file.open("r+b") as opened:
        opened.seek(at + 77)
        opened.write(bytes([data[at + 77] ^ 4]))
    assert rig.run(prompt) == 1, "what comes before the bad block is good"
    rig.settle()
    assert rig.wrong == []
    assert rig.store.corrupt_blocks == 1
    rig.close()
    assert needle[:77] not in file.read_bytes() or rig.store.tier_of(prompt[1]) is not None


def test_the_self_test_times_both_tiers_and_leaves_nothing(tmp_path: Path) -> None:
    rig = StoreRig(tmp_path)
    timings = rig.store.self_test()
    assert [timing.tier for timing in timings] == ["ddr", "ssd"]
    assert all(timing.seconds > 0 and timing.size_bytes for timing in timings)
    rig.settle()
    rig.store.check_integrity()
    assert sum(state.blocks for state in rig.store.states()) == 0
    rig.close()
    again = StoreRig(tmp_path)
    again.settle()
    assert sum(state.blocks for state in again.store.states()) == 0
    again.close()


def test_clear_takes_a_tenant_off_the_disk(tmp_path: Path) -> None:
    rig = StoreRig(tmp_path)
    a, b = OWNER, Owner(tenant_tag("b"))
    for number in range(20):
        rig.run(chain(number, 1, 2, 3), a if number % 2 else b)
        rig.settle()
    names = [name for number in range(0, 20, 2) for name in chain(number, 1, 2, 3)]
    rig.pool.forget([block for name in names if (block := rig.pool.find(name)) is not None])
    blocks, size_bytes = rig.store.clear(b.tenant)
    assert blocks > 10 and size_bytes >= blocks * rig.layout.block_bytes
    rig.settle()
    rig.store.check_integrity()
    rig.close()
    again = StoreRig(tmp_path)
    again.settle()
    index = again.store._index
    assert not len(rows_of(index, b.tenant))
    assert len(rows_of(index, a.tenant))
    again.close()


def test_a_directory_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="ssd_dir"):
        StoreRig(tmp_path / "file")
