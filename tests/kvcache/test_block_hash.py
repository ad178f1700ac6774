from array import array
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.block_hash import BlockHasher, block_hashes, root_hash

ROOT = root_hash("f00d", 4, "float32")
token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_chain_is_what_the_contract_says() -> None:
    tokens = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    first = sha256(ROOT + b"".join(t.to_bytes(4, "little") for t in tokens[:4])).digest()[:16]
    second = sha256(first + b"".join(t.to_bytes(4, "little") for t in tokens[4:8])).digest()[:16]
    assert block_hashes(ROOT, tokens, 4) == [first, second]


@given(token_lists, st.integers(1, 8))
def test_names_whole_blocks_only(tokens: list[int], block_tokens: int) -> None:
    hashes = block_hashes(ROOT, tokens, block_tokens)
    assert len(hashes) == len(tokens) // block_tokens
    assert len(set(hashes)) == len(hashes)
    assert all(len(name) == 16 for name in hashes)


@given(token_lists, token_lists)
def test_equal_names_mean_equal_prefixes(left: list[int], right: list[int]) -> None:
    for i, (a, b) in enumerate(zip(block_hashes(ROOT, left, 2), block_hashes(ROOT, right, 2), strict=False)):
        assert (a == b) == (left[: 2 * i + 2] == right[: 2 * i + 2])


def test_every_field_of_the_root_counts() -> None:
    roots = {
        ROOT,
        root_hash("f00e", 4, "float32"),
        root_hash("f00d", 8, "float32"),
        root_hash("f00d", 4, "bfloat16"),
        root_hash("f00d", 4, "float32", adapter="a"),
        root_hash("f00d", 4, "float32", cache_salt="a"),
        root_hash("f00d", 4, "float32", adapter="a", cache_salt="b"),
        root_hash("f00d", 4, "float32", adapter="ab"),
    }
    assert len(roots) == 8


@given(st.lists(token_lists, max_size=6), st.integers(1, 5))
def test_a_growing_sequence_gets_the_same_names(pieces: list[list[int]], block_tokens: int) -> None:
    hasher = BlockHasher(ROOT, block_tokens)
    tokens: list[int] = []
    for piece in pieces:
        tokens += piece
        hasher.extend(tokens[hasher.named_tokens :])
    assert hasher.hashes == block_hashes(ROOT, tokens, block_tokens)


def test_any_sequence_of_ids_will_do() -> None:
    ids = [7, 8, 9, 2**32 - 1]
    assert block_hashes(ROOT, tuple(ids), 2) == block_hashes(ROOT, ids, 2) == block_hashes(ROOT, array("I", ids), 2)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_an_impossible_id_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        block_hashes(ROOT, [token], 1)
