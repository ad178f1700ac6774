"""The attention function that every layer of a model calls in place of its own.

Registered with transformers under one name, it receives what a step brings along as the keyword argument
STEP_ARGUMENT, which models hand down from `forward` to every layer.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from baton.errors import UnsupportedModel
from engine.attention.kernels import Accelerator, AttentionOptions, Kernel, choose_kernel
from engine.attention.step_plan import StepPlan
from engine.attention.torch_kernel import torch_attention
from engine.attention.varlen_kernel import VarlenStep

PAGED_ATTENTION = "baton_paged"
STEP_ARGUMENT = "baton_attention"


class LayerAttention(Protocol):
    """What answers the layers during one forward."""

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """[tokens, heads, head_dim] each, to [tokens, heads, head_dim of the values]."""

    def check(self, module: torch.nn.Module, window: int | None, mask: Tensor | None, extra: dict[str, Any]) -> None:
        """Sees the mask that the model made, if any, and what else it passed to its attention."""


def register_paged_attention() -> None:
    """Makes PAGED_ATTENTION a name that transformers knows; idempotent.

    No mask function is registered beside it, whereupon transformers builds no masks.
    """
    AttentionInterface.register(PAGED_ATTENTION, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    baton_attention: LayerAttention | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, heads, tokens, head_dim] each, to [1, tokens, heads, head_dim].

    Raises UnsupportedModel when the model does not hand the step's argument down to its layers.
    """
    if baton_attention is None:
        raise UnsupportedModel(f"{type(module).__name__} does not pass keyword arguments on to its attention function.")
    baton_attention.check(module, sliding_window, attention_mask, extra)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return baton_attention.attend(module, query, key, value, options)[None], None


class PagedAttention:
    """One step over the pool: writes the new keys and values, tells the listener, attends."""

    def __init__(
        self, plan: StepPlan, pages: Tensor, accelerator: Accelerator, on_layer: Callable[[int], None] | None
    ) -> None:
        """`pages` is the region, shaped as its KVLayout says."""
        self._plan, self._pages, self._accelerator, self._on_layer = plan, pages, accelerator, on_layer
        self._varlen: VarlenStep | None = None

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        layer: int = module.layer_idx  # type: ignore[assignment]
        keys, values = self._pages[layer].unbind(0)
        for pages, states in ((keys, key), (values, value)):
            pages.flatten(0, 1).index_copy_(0, self._plan.slots, states)
        if self._on_layer is not None:
            self._on_layer(layer)
        return self._attend(query, keys, values, options)

    def check(self, module: torch.nn.Module, window: int | None, mask: Tensor | None, extra: dict[str, Any]) -> None:
        """Nothing: the loader's probe has looked at this model."""

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
        kernel = choose_kernel(self._accelerator, query.dtype, query.shape[-1], self._plan.block_tokens, options)
        if kernel is Kernel.TORCH:
            return torch_attention(self._plan, query, keys.flatten(0, 1), values.flatten(0, 1), options)
        if self._varlen is None:
            self._varlen = VarlenStep(self._plan)
        return self._varlen.attend(kernel, query, keys, values, options)
