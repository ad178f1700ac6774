"""Which layers reach the loop together."""

from baton.ids import RequestId
from baton.layout import KVLayout
from engine.interface import BlocksWritten
from prefill_worker.gather import GATHER_BYTES, Layer, LayerGatherer

SMALL = KVLayout(layers=4, blocks=8, block_tokens=4, kv_heads=2, head_dim=8, dtype="float32")
LARGE = KVLayout(layers=4, blocks=8, block_tokens=32, kv_heads=8, head_dim=128, dtype="float32")
WRITTEN = [BlocksWritten(RequestId("r"), 0, 8)]


def gathered(layout: KVLayout, layers: list[int]) -> list[list[int]]:
    told: list[list[int]] = []

    def deliver(piece: object) -> None:
        assert isinstance(piece, list)
        told.append([layer for layer, _ in piece])

    gatherer = LayerGatherer(layout, deliver)
    for layer in layers:
        gatherer.written(layer, WRITTEN)
    return told


def test_small_layers_come_together_with_the_last() -> None:
    assert 4 * 8 * 2 * SMALL.slice_bytes < GATHER_BYTES
    assert gathered(SMALL, [0, 1, 2, 3, 0, 1, 2, 3]) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_enough_bytes_do_not_wait_for_the_last_layer() -> None:
    assert GATHER_BYTES / 2 <= 8 * 2 * LARGE.slice_bytes < GATHER_BYTES
    assert gathered(LARGE, [0, 1, 2, 3]) == [[0, 1], [2, 3]]


def test_what_a_failed_step_left_is_dropped() -> None:
    assert gathered(SMALL, [0, 1, 0, 1, 2, 3]) == [[0, 1, 2, 3]]


def test_what_was_delivered_does_not_change_any_more() -> None:
    pieces: list[list[Layer]] = []
    gatherer = LayerGatherer(SMALL, lambda piece: pieces.append(list(piece)) or pieces.append(piece))  # type: ignore[func-returns-value,arg-type]
    for layer in (0, 1, 2, 3, 0, 1):
        gatherer.written(layer, WRITTEN)
    assert pieces[0] == pieces[1] and len(pieces) == 2
