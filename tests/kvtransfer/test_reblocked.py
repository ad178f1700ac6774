"""KV in blocks of another size is the same tokens, whatever the sizes, and travels as any other."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transfer_rig import REQUEST, SOURCE_LAYOUT, TARGET_LAYOUT, StagedRegion, fill_random, ids, pair, slices

from baton.digest import block_digests
from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.reblocked import Reblocked
from kvtransfer.region import HostRegion
from kvtransfer.registry import find_transport

BASE = KVLayout(layers=2, blocks=12, block_tokens=4, kv_heads=1, head_dim=3, dtype="float16")
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """A prompt of `tokens` in these blocks of a source, seen in blocks of `target_tokens`."""

    source_tokens: int
    target_tokens: int
    tokens: int
    blocks: tuple[BlockId, ...]
    kind: type[HostRegion]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    source_tokens, target_tokens = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    count = draw(st.integers(1, BASE.blocks))
    blocks = draw(st.permutations(range(BASE.blocks)))[:count]
    if draw(st.booleans()):
        blocks = sorted(blocks)
    tokens = draw(st.integers((count - 1) * source_tokens + 1, count * source_tokens))
    return Case(source_tokens, target_tokens, tokens, ids(*blocks), draw(st.sampled_from((HostRegion, StagedRegion))))


def token_by_token(region: HostRegion, case: Case, target: KVLayout) -> Bytes:
    """The prompt copied as slowly as can be: [layer][k|v][block][bytes of a slice]."""
    source = slices(region).reshape(BASE.layers, 2, BASE.blocks, case.source_tokens, -1)
    copied = np.zeros((BASE.layers, 2, target.blocks_for(case.tokens), case.target_tokens, source.shape[-1]), np.uint8)
    for token in range(case.tokens):
        block = case.blocks[token // case.source_tokens]
        place = source[:, :, block, token % case.source_tokens]
        copied[:, :, token // case.target_tokens, token % case.target_tokens] = place
    return copied.reshape(*copied.shape[:3], -1)


@contextmanager
def reblocked(case: Case) -> Iterator[tuple[Reblocked, Bytes]]:
    """And what it should be."""
    target = replace(BASE, blocks=99, block_tokens=case.target_tokens)
    with closing(case.kind.allocate(replace(BASE, block_tokens=case.source_tokens))) as region:
        fill_random(region, seed=case.tokens)
        yield Reblocked(region, case.blocks, case.tokens, target), token_by_token(region, case, target)


@given(cases(), st.data())
def test_every_run_of_blocks_is_that_of_a_copy_token_by_token(case: Case, data: st.DataObject) -> None:
    with reblocked(case) as (source, copied):
        assert source.layout.blocks == copied.shape[2] and not source.is_host
        first = data.draw(st.integers(0, source.layout.blocks - 1))
        blocks = data.draw(st.integers(1, source.layout.blocks - first))
        for layer, kv in np.ndindex(BASE.layers, 2):
            found = source.readable(layer, kv, first, blocks)
            assert bytes(found) == copied[layer, kv, first : first + blocks].tobytes()


@given(cases(), st.randoms(use_true_random=False))
def test_digests_are_those_of_what_is_read(case: Case, random: Any) -> None:
    with reblocked(case) as (source, copied):
        blocks = [BlockId(random.randrange(source.layout.blocks)) for _ in range(random.randrange(9))]
        assert source.digests(blocks) == block_digests(memoryview(copied.tobytes()), source.layout, blocks)


def test_blocks_of_more_than_a_batch_are_digested_too() -> None:
    layout = KVLayout(layers=1, blocks=40, block_tokens=16, kv_heads=8, head_dim=128, dtype="bfloat16")
    with closing(HostRegion.allocate(layout)) as region:
        fill_random(region, seed=3)
        same = Reblocked(region, ids(*range(40)), 640, layout)
        assert same.digests(ids(*range(40))) == region.digests(ids(*range(40)))


@pytest.mark.parametrize("change", [{"kv_heads": 2}, {"dtype": "bfloat16"}, {"layers": 3}])
def test_only_the_size_of_blocks_can_be_another(change: dict[str, Any]) -> None:
    with closing(HostRegion.allocate(BASE)) as region, pytest.raises(AssertionError):
        Reblocked(region, ids(1), 4, replace(BASE, **change))


def test_there_must_be_a_block_for_every_token() -> None:
    with closing(HostRegion.allocate(BASE)) as region, pytest.raises(AssertionError):
        Reblocked(region, ids(1), 5, BASE)


# ---- over transports


def run(transport: str, test: Callable[[Any], Any], **layouts: KVLayout) -> None:
    if (reason := find_transport(transport).missing()) is not None:
        pytest.skip(reason)

    async def main() -> None:
        async with asyncio.timeout(30), pair(transport, **layouts) as ends:
            await test(ends)

    asyncio.run(main())


@pytest.mark.parametrize("transport", ["inproc", "shm", "ucx", "tcp"])
@pytest.mark.parametrize("target_tokens", [3, 8])
def test_every_transport_that_converts_carries_it(transport: str, target_tokens: int) -> None:
    async def test(ends: Any) -> None:
        source = Reblocked(ends.source, ids(7, 3, 4, 5, 0), 19, ends.target.layout)
        blocks, count = ids(11, 12, 9, 10, 1, 2, 20)[: source.layout.blocks], source.layout.blocks
        connection = await ends.connect(blocks)
        connection.read_from(source)
        for layer in range(source.layout.layers):
            await connection.write(layer, ids(*range(count)), blocks)
        await connection.fence()
        assert ends.target.digests(blocks) == source.digests(ids(*range(count)))
        assert connection.bytes_written == count * ends.target.layout.block_bytes
        await connection.close()

    run(transport, test, target_layout=replace(TARGET_LAYOUT, block_tokens=target_tokens))


def test_the_workers_own_blocks_are_not_written_as_they_are() -> None:
    async def test(ends: Any) -> None:
        connection = await ends.connect(ids(1))
        with pytest.raises(AssertionError, match="blocks of another size"):
            await connection.write(0, ids(1), ids(1))
        await connection.close()

    run("inproc", test, target_layout=replace(TARGET_LAYOUT, block_tokens=8))


def test_nixl_moves_blocks_as_they_lie_and_says_so() -> None:
    unlike = replace(SOURCE_LAYOUT, block_tokens=8)

    async def test(ends: Any) -> None:
        assert not ends.sender.converts("nixl")
        with pytest.raises(TransferError, match="as they lie"):
            await ends.sender.connect(REQUEST, [ends.open(ids(1))], unlike)
        connection = await ends.connect(ids(1))
        with pytest.raises(TransferError, match="as they lie"):
            connection.read_from(Reblocked(ends.source, ids(1), 4, ends.target.layout))
        await connection.close()

    run("nixl", test)
