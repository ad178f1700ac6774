from baton.ids import BlockHash
from kvcache.block_hash import block_hashes, root_hash
from router.placement.block_names import BlockKind, BlockNames
from tests.router.placement_rig import a_worker

KIND = BlockKind("f", 4, "float32")


def test_names_are_those_that_workers_give_their_blocks() -> None:
    prompt = list(range(18))
    root = root_hash("f", 4, "float32", cache_salt="salt")
    assert BlockNames(prompt, "salt")(KIND) == block_hashes(root, prompt, 4)
    assert len(BlockNames(prompt)(KIND)) == 4, "whole blocks only"


def test_other_weights_blocks_types_and_salts_are_other_names() -> None:
    prompt = range(16)
    names = BlockNames(prompt)
    kinds = [KIND, KIND._replace(fingerprint="g"), KIND._replace(block_tokens=8), KIND._replace(kv_dtype="bfloat16")]
    every: set[BlockHash] = {name for kind in kinds for name in names(kind)}
    every |= set(BlockNames(prompt, "salt")(KIND))
    assert len(every) == 4 + 4 + 2 + 4 + 4


def test_a_kind_is_named_once() -> None:
    names = BlockNames(range(16))
    assert names(KIND) is names(BlockKind("f", 4, "float32"))


def test_a_workers_kind() -> None:
    assert BlockKind.of(a_worker("d")) == BlockKind("f", 16, "float32")
