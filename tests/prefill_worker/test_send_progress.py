"""What is sent next, and what may be told to have landed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.progress import Piece, SendProgress


def drain(progress: SendProgress) -> list[Piece]:
    pieces = []
    while piece := progress.next_piece():
        progress.written(piece)
        pieces.append(piece)
    return pieces


def test_a_link_that_keeps_up_sends_each_layer_of_each_chunk() -> None:
    progress = SendProgress(layers=2, blocks=4, piece_blocks_max=100)
    sent = []
    for end in (2, 4):
        for layer in (0, 1):
            progress.final(layer, end)
            sent += drain(progress)
    assert sent == [Piece(0, 0, 2), Piece(1, 0, 2), Piece(0, 2, 4), Piece(1, 2, 4)]


def test_what_waits_is_merged() -> None:
    progress = SendProgress(layers=2, blocks=4, piece_blocks_max=100)
    for end in (2, 4):
        for layer in (0, 1):
            progress.final(layer, end)
    assert drain(progress) == [Piece(0, 0, 4), Piece(1, 0, 4)]


def test_layers_take_turns_so_that_whole_blocks_are_complete_soon() -> None:
    progress = SendProgress(layers=2, blocks=4, piece_blocks_max=2)
    progress.final(0, 4)
    progress.final(1, 4)
    assert drain(progress) == [Piece(0, 0, 2), Piece(1, 0, 2), Piece(0, 2, 4), Piece(1, 2, 4)]


def test_the_decode_workers_own_blocks_are_not_sent() -> None:
    progress = SendProgress(layers=1, blocks=2, piece_blocks_max=100)
    progress.final(0, -3)
    assert progress.next_piece() is None
    progress.digested(-3, (1, 2, 3, 4))
    progress.digested(1, (5,))
    assert progress.digests == [4, 5]


@pytest.mark.parametrize("digests_first", [False, True])
def test_a_block_is_told_once_it_has_landed_and_its_digest_is_known(digests_first: bool) -> None:
    progress = SendProgress(layers=1, blocks=2, piece_blocks_max=100)
    if digests_first:
        progress.digested(0, (7, 8))
    progress.final(0, 2)
    drain(progress)
    assert progress.completes_blocks
    assert progress.next_landed() is None, "nothing was fenced"
    progress.landed()
    assert not progress.completes_blocks
    if not digests_first:
        assert progress.next_landed() is None
        progress.digested(0, (7, 8))
    assert progress.next_landed() == (0, [7, 8])
    assert progress.next_landed() is None
    assert progress.is_done


@given(
    layers=st.integers(1, 4),
    ends=st.lists(st.integers(-3, 20), min_size=1, max_size=6).map(sorted),
    piece_blocks_max=st.integers(1, 8),
    sends=st.lists(st.booleans(), min_size=24, max_size=24),
)
def test_every_slice_is_sent_once_and_every_block_told_once_in_order(
    layers: int, ends: list[int], piece_blocks_max: int, sends: list[bool]
) -> None:
    blocks = max(0, ends[-1])
    progress = SendProgress(layers, blocks, piece_blocks_max)
    sent: list[tuple[int, int]] = []
    told: list[int] = []

    def send() -> None:
        if piece := progress.next_piece():
            assert 0 < piece.blocks <= piece_blocks_max
            sent.extend((piece.layer, block) for block in range(piece.first, piece.end))
            progress.written(piece)
            if progress.completes_blocks:
                progress.landed()
        if landed := progress.next_landed():
            told.extend(range(landed[0], landed[0] + len(landed[1])))
            assert {(layer, told[-1]) for layer in range(layers)} <= set(sent)

    turns = iter(sends)
    for end in ends:
        for layer in range(layers):
            progress.final(layer, end)
            if next(turns):
                send()
        progress.digested(min(0, end), tuple(range(100, 100 + end - min(0, end))) if end > 0 else ())
        if end > 0:
            assert progress.digests == list(range(100, 100 + end))
    for _ in range(layers * blocks + 1):
        send()
    assert sorted(sent) == [(layer, block) for layer in range(layers) for block in range(blocks)]
    assert told == list(range(blocks))
    assert progress.is_done
