"""Runs the model: packs a step's rows into one forward over the paged pool, and gives back logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from baton.layout import KVLayout
from baton.sampling import PositionLogprobs
from engine.attention.kernels import Accelerator
from engine.attention.paged import STEP_ARGUMENT, PagedAttention
from engine.attention.step_plan import StepPlan
from engine.batch import Row
from engine.device_region import DeviceRegion
from engine.logprobs import logprobs_of
from engine.model.loader import LoadedModel


class HostMemory(Protocol):
    """A region in host memory, such as kvtransfer.region.HostRegion."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def memory(self) -> memoryview:
        """The whole region, writable."""


@dataclass(frozen=True, slots=True)
class StepLogits:
    logits: Tensor
    """Float32 [rows that sample, vocabulary], in the order of the rows; on the model's device."""
    prompt_logprobs: tuple[tuple[PositionLogprobs, ...], ...]
    """One entry a row: for a row that asks, one position for each of its tokens whose successor is known
    (all but the last, and the last with `next_token`), about that successor; empty for other rows."""

    def only(self, rows: Sequence[int], sampled: Sequence[int]) -> "StepLogits":
        """Implements engine.computing.Logits."""
        return StepLogits(self.logits[list(sampled)], tuple(self.prompt_logprobs[row] for row in rows))


class ModelRunner:
    """Owns no memory but a view of the region's; not thread-safe."""

    def __init__(self, loaded: LoadedModel, region: HostMemory | DeviceRegion) -> None:
        self._loaded = loaded
        self._region = region
        self._pages = region_tensor(region)
        self._accelerator = Accelerator.of(loaded.device)

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], on_layer: Callable[[int], None] | None = None) -> StepLogits:
        """Computes the rows' new tokens and writes their keys and values into the region.

        `on_layer` is called with each layer's index as soon as the writes of its keys and values are issued.
        """
        plan = StepPlan(rows, self._pages.shape[3], self._loaded.device)
        wanted = _Wanted.of(rows)
        attention = PagedAttention(plan, self._pages, self._accelerator, self._listener(on_layer))
        token_ids = [token for row in rows for token in row.token_ids]
        logits = self._loaded.logits_at(
            torch.tensor([token_ids], device=self._loaded.device),
            plan.positions[None],
            torch.tensor(wanted.positions, dtype=torch.long, device=self._loaded.device),
            **{STEP_ARGUMENT: attention},
        )
        sampled = len(wanted.positions) - sum(wanted.prompt_positions)
        return StepLogits(logits[:sampled].float(), _prompt_logprobs(rows, logits[sampled:], wanted.prompt_positions))

    def _listener(self, on_layer: Callable[[int], None] | None) -> Callable[[int], None] | None:
        """A device region marks each layer's writes first, so that what the listener reads waits for them."""
        if not isinstance(self._region, DeviceRegion):
            return on_layer
        mark = self._region.mark

        def mark_then_tell(layer: int) -> None:
            mark(layer)
            if on_layer is not None:
                on_layer(layer)

        return mark_then_tell

    def close(self) -> None:
        """Lets go of the region, which may then be closed."""
        del self._pages, self._region


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which of the packed positions need logits: first those that sample, then the prompts'."""

    positions: tuple[int, ...]
    prompt_positions: tuple[int, ...]
    """How many of them belong to each row's prompt logprobs."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "_Wanted":
        sampling: list[int] = []
        prompt: list[int] = []
        counts, first = [], 0
        for row in rows:
            counts.append(len(_successors(row)))
            prompt.extend(range(first, first + counts[-1]))
            first += len(row.token_ids)
            if row.samples:
                sampling.append(first - 1)
        return cls((*sampling, *prompt), tuple(counts))


def _successors(row: Row) -> tuple[int, ...]:
    """What follows each position of a row that asks for prompt logprobs, as far as it is known."""
    if row.prompt_logprobs is None:
        return ()
    return row.token_ids[1:] if row.next_token is None else (*row.token_ids[1:], row.next_token)


def _prompt_logprobs(
    rows: Sequence[Row], logits: Tensor, counts: Sequence[int]
) -> tuple[tuple[PositionLogprobs, ...], ...]:
    """`logits` holds the rows' wanted prompt positions, one row's after another's."""
    reported: list[tuple[PositionLogprobs, ...]] = []
    for row, part in zip(rows, logits.split(list(counts)), strict=True):
        reported.append(tuple(logprobs_of(part, _successors(row), row.prompt_logprobs or 0)))
    return tuple(reported)


def region_tensor(region: HostMemory | DeviceRegion) -> Tensor:
    """The region as a tensor shaped as its layout says; a view, not a copy."""
    if isinstance(region, DeviceRegion):
        return region.tensor
    layout = region.layout
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return torch.frombuffer(region.memory, dtype=dtype, count=layout.region_bytes // dtype.itemsize).view(layout.shape)


def kv_layout(loaded: LoadedModel, block_tokens: int, blocks: int) -> KVLayout:
    """The layout of a pool for this model; KV is kept in the model's own dtype."""
    facts = loaded.facts
    return KVLayout(facts.layers, blocks, block_tokens, facts.kv_heads, facts.head_dim, loaded.dtype_name)


def blocks_for_memory(loaded: LoadedModel, block_tokens: int, memory_bytes: int) -> int:
    """How many blocks fit; may be 0."""
    return memory_bytes // kv_layout(loaded, block_tokens, 1).block_bytes
