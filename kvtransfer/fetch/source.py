"""What a worker gives others blocks from: a Protocol that its cache implements."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from baton.ids import BlockHash, BlockId


class HeldBlocks(Protocol):
    @property
    def blocks(self) -> Sequence[BlockId]:
        """In the worker's region."""

    @property
    def digests(self) -> Sequence[int]:
        """Of each block; none at all, where the worker makes none."""


class BlockSource(Protocol):
    def hold(self, names: Sequence[BlockHash]) -> AbstractAsyncContextManager[HeldBlocks]:
        """The longest run of `names`, from the first on, that the worker has, perhaps none; inside the context they
        stay as and where they are, however it is left. Raises BatonError if the worker cannot look now."""
