"""What a KV block is called: the chained hash of its tokens and of everything before them.

`hash_i = SHA-256(hash_{i-1} ‖ token ids of block i, little-endian uint32)[:16]`. Equal names mean equal
keys and values, so a root stands for everything but the tokens that decides them.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import cast

from baton.ids import BlockHash

HASH_BYTES = 16
_TOKEN_BYTES = 4
_TOKENS = next(code for code in "IL" if array(code).itemsize == _TOKEN_BYTES)


def root_hash(fingerprint: str, block_tokens: int, dtype: str, *, adapter: str = "", cache_salt: str = "") -> BlockHash:
    """The predecessor of a prompt's first block. Each field is preceded by its length, so that no two
    different sets of fields are hashed alike."""
    fields = (part.encode() for part in (fingerprint, str(block_tokens), dtype, adapter, cache_salt))
    framed = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    return BlockHash(sha256(framed).digest()[:HASH_BYTES])


def block_hashes(root: BlockHash, tokens: Sequence[int], block_tokens: int) -> list[BlockHash]:
    """The names of the whole blocks of `tokens`, given what precedes them. A tail shorter than a block has no name.

    Raises OverflowError if an id is not in [0, 2^32).
    """
    whole = len(tokens) - len(tokens) % block_tokens
    data = _token_bytes(tokens[:whole])
    step = block_tokens * _TOKEN_BYTES
    hashes = []
    previous: bytes = root
    for offset in range(0, len(data), step):
        previous = sha256(previous + data[offset : offset + step]).digest()[:HASH_BYTES]
        hashes.append(previous)
    return cast(list[BlockHash], hashes)


def _token_bytes(tokens: Iterable[int]) -> bytes:
    packed = array(_TOKENS, tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


class BlockHasher:
    """Names the blocks of a sequence that grows, each once.

    `hashes[i]` names block i of all tokens seen so far; `root` is what they follow from.
    """

    __slots__ = ("_block_tokens", "hashes", "root")

    def __init__(self, root: BlockHash, block_tokens: int) -> None:
        self.root, self._block_tokens = root, block_tokens
        self.hashes: list[BlockHash] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """`tokens` is the part of the sequence from the first unnamed block on; what does not fill a block is
        to be given again, with more."""
        previous = self.hashes[-1] if self.hashes else self.root
        self.hashes += block_hashes(previous, tokens, self._block_tokens)

    @property
    def named_tokens(self) -> int:
        """Where the first unnamed block starts."""
        return len(self.hashes) * self._block_tokens
