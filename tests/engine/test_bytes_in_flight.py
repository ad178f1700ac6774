import pytest

from baton.layout import KVLayout
from baton.settings import WorkerSettings
from engine.tiers import BYTES_IN_FLIGHT_MIN, bytes_in_flight_max

LLAMA_8B = KVLayout(layers=32, blocks=100, block_tokens=32, kv_heads=8, head_dim=128, dtype="bfloat16")


@pytest.mark.parametrize(("chunk_tokens", "expected"), [(8192, 2 * 8192 * 131_072), (64, BYTES_IN_FLIGHT_MIN)])
def test_what_two_steps_compute_may_be_on_its_way(chunk_tokens: int, expected: int) -> None:
    assert bytes_in_flight_max(WorkerSettings(chunk_tokens=chunk_tokens), LLAMA_8B) == expected


def test_or_as_much_as_was_asked_for() -> None:
    assert bytes_in_flight_max(WorkerSettings(tier_bytes_in_flight_max=12345), LLAMA_8B) == 12345
