"""Paged attention on CUDA: torch's variable-length FlashAttention, all rows of a step in one launch."""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from engine.attention.kernels import AttentionOptions, Kernel
from engine.attention.step_plan import StepPlan, slot_index


class VarlenStep:
    """A step's lengths and block tables on the device, made once and used by all layers."""

    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan
        self._queries_max = max(span.queries for span in plan.spans)
        self._context_max = max(span.context for span in plan.spans)

    def attend(self, kernel: Kernel, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
        """[tokens, heads, head_dim] over the layer's [block][token][kv head][head dim].

        Without split-KV, so that a row's result does not depend on the batch around it.
        """
        is_paged = kernel is Kernel.VARLEN_PAGED
        if not is_paged:
            keys, values = (pages.flatten(0, 1).index_select(0, self._slots) for pages in (keys, values))
        output = varlen_attn(
            query.contiguous(),
            keys,
            values,
            self._query_bounds,
            None if is_paged else self._context_bounds,
            self._queries_max,
            self._context_max,
            scale=options.scaling,
            window_size=window_size(options.window),
            enable_gqa=True,
            seqused_k=self._contexts if is_paged else None,
            block_table=self._block_table if is_paged else None,
            num_splits=1,
        )
        assert isinstance(output, Tensor)
        return output

    @cached_property
    def _query_bounds(self) -> Tensor:
        return self._bounds([span.queries for span in self._plan.spans])

    @cached_property
    def _context_bounds(self) -> Tensor:
        return self._bounds([span.context for span in self._plan.spans])

    @cached_property
    def _contexts(self) -> Tensor:
        return self._on_device(torch.tensor([span.context for span in self._plan.spans], dtype=torch.int32))

    @cached_property
    def _block_table(self) -> Tensor:
        """[rows, most blocks of any row]: padded with block 0, which `_contexts` keeps from being read."""
        width = -(-self._context_max // self._plan.block_tokens)
        table = torch.zeros(len(self._plan.spans), width, dtype=torch.int32)
        for row, span in enumerate(self._plan.spans):
            blocks = torch.tensor(span.blocks[:width], dtype=torch.int32)
            table[row, : len(blocks)] = blocks
        return self._on_device(table)

    @cached_property
    def _slots(self) -> Tensor:
        """[all rows' contexts]: where they lie in the pool."""
        block_tokens = self._plan.block_tokens
        parts = [slot_index(span.blocks, block_tokens, 0, span.context) for span in self._plan.spans]
        return self._on_device(torch.cat([torch.from_numpy(part) for part in parts]))

    def _bounds(self, lengths: list[int]) -> Tensor:
        """[rows + 1]: cumulative lengths, from 0."""
        return self._on_device(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._plan.device, non_blocking=True)


def window_size(window: int | None) -> tuple[int, int]:
    """FlashAttention counts a window's tokens to the left and right of the query, without the query itself."""
    return (-1, 0) if window is None else (window - 1, 0)
