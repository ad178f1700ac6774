"""How restores are cut: everything once, in order, in pieces of the size asked for."""

from collections import Counter
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from baton.ids import BlockHash, BlockId
from baton.layout import KVLayout
from kvcache.tiers.interface import RestoreTiming, Slot
from kvcache.tiers.io.interface import IoSizes, RestorePart
from kvcache.tiers.io.restore_pieces import SAMPLE_EVERY, LayerCount, plan_restore, read_groups
from kvcache.tiers.io.speeds import UNKNOWN_BYTES_PER_S, TierSpeeds

LAYOUT = KVLayout(layers=6, blocks=100, block_tokens=4, kv_heads=1, head_dim=8, dtype="float32")
LAYER_BYTES = LAYOUT.block_bytes // LAYOUT.layers
Verify = Literal["always", "sampled", "never"]

part_lists = st.lists(
    st.tuples(st.sampled_from(["ddr", "ssd"]), st.sampled_from(["none", "int8"]), st.integers(0, 1000)), max_size=40
).map(
    lambda chosen: [
        RestorePart(tier, Slot(slot), BlockHash(bytes(16)), 0, storage, BlockId(at))  # type: ignore[arg-type]
        for at, (tier, storage, slot) in enumerate(chosen)
    ]
)
size_choices = st.builds(
    IoSizes,
    piece_bytes=st.integers(1, 20_000),
    group_bytes=st.integers(1, 20_000),
    staging_bytes=st.just(0),
    read_bytes=st.integers(1, 2 * LAYOUT.block_bytes),
)


@given(part_lists, size_choices, st.integers(1, 9), st.sampled_from(["always", "sampled", "never"]), st.integers(0, 99))
def test_every_layer_of_every_part_lands_once(
    parts: list[RestorePart], sizes: IoSizes, staging_rows: int, verify: Verify, turn: int
) -> None:
    plan = plan_restore(parts, LAYOUT, sizes, staging_rows, verify, turn)
    landings = Counter((at, layer) for piece in plan.pieces for at in piece.positions for layer in piece.layers)
    assert landings == Counter((at, layer) for at in range(len(parts)) for layer in range(LAYOUT.layers))
    for piece in plan.pieces:
        some = [parts[at] for at in piece.positions]
        assert {part.tier for part in some} == {piece.tier} and len({part.storage for part in some}) == 1
        assert {part.storage for part in some} == {piece.storage}
        if piece.is_staged:
            assert len(some) <= staging_rows
            is_whole = piece.layers == range(LAYOUT.layers)
            assert is_whole or (piece.tier, piece.storage) == ("ssd", "none")
            assert is_whole or len(piece.layers) == 1 or len(piece.layers) * LAYER_BYTES >= sizes.read_bytes
            assert [part.slot for part in some] == sorted(part.slot for part in some)
        else:
            assert len(some) == 1 or len(some) * len(piece.layers) * LAYER_BYTES <= sizes.piece_bytes
    in_layers = [piece.layers.start for piece in plan.pieces if not piece.is_staged]
    assert in_layers == sorted(in_layers), "lowest layers first"
    assert [piece.is_staged for piece in plan.pieces] == sorted((p.is_staged for p in plan.pieces), reverse=True)
    from_disk = [piece.layers.start for piece in plan.pieces if piece.tier == "ssd" and piece.storage == "none"]
    assert from_disk == sorted(from_disk), "there, too"
    checks = plan.pool_checks | plan.stored_checks
    assert {at for at in checks if parts[at].storage == "none"} == plan.pool_checks, "what is decoded is checked before"
    assert {at for at, part in enumerate(parts) if part.tier == "ssd"} <= checks
    if verify != "sampled":
        assert checks == {at for at, part in enumerate(parts) if part.tier == "ssd" or verify == "always"}


@given(part_lists, size_choices, st.randoms(use_true_random=False))
def test_layers_have_landed_when_all_below_have(parts: list[RestorePart], sizes: IoSizes, order: object) -> None:
    pieces = list(plan_restore(parts, LAYOUT, sizes, 3, "never", 0).pieces)
    count = LayerCount(pieces, LAYOUT.layers)
    order.shuffle(pieces)  # type: ignore[attr-defined]
    landed: set[tuple[int, int]] = set()
    for piece in pieces:
        count.landed(piece.layers, len(piece.positions))
        landed |= {(at, layer) for at in piece.positions for layer in piece.layers}
        done = [all((at, layer) in landed for at in range(len(parts))) for layer in range(LAYOUT.layers)]
        assert all(done[: count.layers]), "what is said to have landed has"
    assert count.layers == LAYOUT.layers


def test_groups_of_layers_are_as_large_as_asked_for() -> None:
    parts = [RestorePart("ddr", Slot(at), BlockHash(bytes(16)), 0, "none", BlockId(at)) for at in range(8)]
    sizes = IoSizes(piece_bytes=10**6, group_bytes=8 * LAYER_BYTES + 1)
    plan = plan_restore(parts, LAYOUT, sizes, 3, "never", 0)
    assert [piece.layers for piece in plan.pieces] == [range(2), range(2, 4), range(4, 6)]


def test_large_rows_of_the_disk_are_read_by_groups_of_layers() -> None:
    sizes = IoSizes(read_bytes=LAYOUT.block_bytes // 4)
    assert read_groups(LAYOUT, sizes) == [range(1), range(1, 3), range(3, 4), range(4, 6)]
    assert read_groups(LAYOUT, IoSizes(read_bytes=LAYOUT.block_bytes // 2 + 1)) == [range(6)]
    assert read_groups(LAYOUT, IoSizes(read_bytes=1)) == [range(layer, layer + 1) for layer in range(6)]


def test_in_time_every_part_is_in_a_sample() -> None:
    parts = [RestorePart("ddr", Slot(at), BlockHash(bytes(16)), 0, "none", BlockId(at)) for at in range(50)]
    samples = [plan_restore(parts, LAYOUT, IoSizes(), 3, "sampled", turn).pool_checks for turn in range(SAMPLE_EVERY)]
    assert Counter(at for sample in samples for at in sample) == Counter(range(50))


def test_speeds_are_learned_from_restores_that_say_something() -> None:
    speeds = TierSpeeds()
    speeds.learn([RestoreTiming("ddr", 1000, 1.0)])
    assert speeds.bytes_per_s("ddr") == UNKNOWN_BYTES_PER_S["ddr"], "too small"
    speeds.learn([RestoreTiming("ddr", 2**30, 1.0)])
    assert speeds.bytes_per_s("ddr") == 2**30
    speeds.learn([RestoreTiming("ddr", 2**30, 0.5)])
    assert 2**30 < speeds.bytes_per_s("ddr") < 2**31
    assert speeds.bytes_per_s("ssd") == UNKNOWN_BYTES_PER_S["ssd"]
