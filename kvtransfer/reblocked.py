"""One prompt's KV in blocks of another size than those that it lies in."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from baton.digest import BATCH_BYTES, digests_of
from baton.ids import BlockId
from baton.layout import DTYPE_BYTES, KVLayout
from kvtransfer.interface import Source
from kvtransfer.runs import RUN_BYTES_MAX, Rows, Run, rows_of, run_blocks_max, runs_of


class Reblocked:
    """The first `tokens` tokens that lie in `blocks` of a source, as blocks 0, 1, ... of another layout. A slice is
    tokens in a row, so each of the other layout's is gathered from where its tokens lie when it is read.

    Implements kvtransfer.interface.Source; owns nothing. Past the last token all bytes are zero.
    """

    is_host = False

    def __init__(self, source: Source, blocks: Sequence[BlockId], tokens: int, target: KVLayout) -> None:
        assert source.layout.unconvertible(target) is None
        assert tokens <= len(blocks) * source.layout.block_tokens
        self.layout = replace(target, blocks=target.blocks_for(tokens))
        self._source, self._blocks, self._tokens = source, tuple(blocks), tokens
        self._token_bytes = target.kv_heads * target.head_dim * DTYPE_BYTES[target.dtype]

    def readable(self, layer: int, kv: int, first_block: int, blocks: int) -> memoryview:
        assert 1 <= blocks <= self.layout.blocks - first_block
        first = first_block * self.layout.block_tokens
        end = min(first + blocks * self.layout.block_tokens, self._tokens)
        gathered = np.empty((blocks * self.layout.block_tokens, self._token_bytes), np.uint8)
        gathered[end - first :] = 0
        self._gather(layer, kv, first, gathered[: end - first])
        return gathered.reshape(-1).data

    def _gather(self, layer: int, kv: int, first: int, place: Rows) -> None:
        """Copies the tokens from `first` on, one a row, as many as `place` has rows."""
        own = self._source.layout
        end, begun = first + len(place), self.source_blocks(first, first + len(place))
        some, token = self._blocks[begun], begun.start * own.block_tokens
        for run in runs_of(some, some, run_blocks_max(own)):
            view = self._source.readable(layer, kv, run.source, run.blocks)
            rows = np.frombuffer(view, np.uint8).reshape(-1, self._token_bytes)
            stop = min(end, token + len(rows))
            place[max(token, first) - first : stop - first] = rows[max(first - token, 0) : stop - token]
            token += len(rows)

    def source_blocks(self, first: int, end: int) -> slice:
        """Which of the source's blocks the tokens `[first, end)` lie in."""
        return slice(first // self._source.layout.block_tokens, self._source.layout.blocks_for(end))

    def digests(self, blocks: Sequence[BlockId]) -> Sequence[int]:
        batch_bytes = BATCH_BYTES if self._source.is_host else RUN_BYTES_MAX
        digests: list[int] = []
        for run in runs_of(blocks, blocks, run_blocks_max(self.layout, batch_bytes)):
            digests += self._run_digests(run)
        return digests

    def _run_digests(self, run: Run) -> list[int]:
        return digests_of(
            self.layout.layers,
            lambda layer, kv: rows_of(self.readable(layer, kv, run.source, run.blocks), self.layout),
        )
