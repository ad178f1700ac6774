import pytest
import torch

from baton.errors import SettingsError
from baton.settings import WorkerSettings
from engine.pool_size import CPU_MEMORY_BYTES, pool_blocks

CPU = torch.device("cpu")


def test_blocks_asked_for_are_what_one_gets() -> None:
    assert pool_blocks(WorkerSettings(kv_blocks=5), 2**40, 100, CPU) == 5


def test_memory_asked_for_is_filled() -> None:
    assert pool_blocks(WorkerSettings(kv_memory_bytes=1000, sequences_max=1), 100, 10, CPU) == 10


def test_the_default_for_a_cpu() -> None:
    assert pool_blocks(WorkerSettings(), 2**20, 10_000_000, CPU) == CPU_MEMORY_BYTES // 2**20


def test_no_more_by_default_than_a_full_batch_needs() -> None:
    assert pool_blocks(WorkerSettings(sequences_max=3, block_tokens=16), 100, 33, CPU) == 9


def test_a_pool_without_a_block_is_refused() -> None:
    with pytest.raises(SettingsError, match="kv_memory_bytes"):
        pool_blocks(WorkerSettings(kv_memory_bytes=99), 100, 10, CPU)
