"""What a prompt's blocks are called, on each kind of worker."""

from collections.abc import Sequence
from typing import NamedTuple

from baton.cluster.worker_info import WorkerInfo
from baton.ids import BlockHash
from kvcache.block_hash import block_hashes, root_hash


class Family(NamedTuple):
    """What two workers must have in common to hand each other KV."""

    model: str
    fingerprint: str
    kv_dtype: str

    @classmethod
    def of(cls, worker: WorkerInfo) -> "Family":
        return cls(worker.model, worker.fingerprint, worker.kv_dtype)


class BlockKind(NamedTuple):
    """What two workers must have in common to call blocks by the same names."""

    fingerprint: str
    block_tokens: int
    kv_dtype: str

    @classmethod
    def of(cls, worker: WorkerInfo) -> "BlockKind":
        return cls(worker.fingerprint, worker.block_tokens, worker.kv_dtype)


class BlockNames:
    """The names of a prompt's whole blocks, hashed once for each kind and only where they are asked for."""

    __slots__ = ("_cache_salt", "_known", "_prompt")

    def __init__(self, prompt: Sequence[int], cache_salt: str = "") -> None:
        self._prompt, self._cache_salt = prompt, cache_salt
        self._known: dict[BlockKind, Sequence[BlockHash]] = {}

    def __call__(self, kind: BlockKind) -> Sequence[BlockHash]:
        names = self._known.get(kind)
        if names is None:
            root = root_hash(kind.fingerprint, kind.block_tokens, kind.kv_dtype, cache_salt=self._cache_salt)
            names = self._known[kind] = block_hashes(root, self._prompt, kind.block_tokens)
        return names
