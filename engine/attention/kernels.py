"""Which kernel serves which layer."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_HEAD_DIM_MAX = 256
_FLASH_HEAD_DIM_MULTIPLE = 8
_FLASH2_PAGE_MULTIPLE = 256
"""FlashAttention 2 reads pages only of a multiple of this many tokens; 3 and later read any."""
_FLASH_CAPABILITY_MIN = (8, 0)


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks for beyond plain causal attention."""

    scaling: float
    window: int | None = None
    """Positions a query attends to, its own included; None: all before it."""
    softcap: float | None = None
    """Scores pass through `softcap * tanh(score / softcap)`."""
    sinks: Tensor | None = None
    """[heads]: a score per head that takes part in the softmax and attends to nothing."""

    @property
    def is_plain(self) -> bool:
        """Whether fused kernels know all of it."""
        return self.softcap is None and self.sinks is None


class Kernel(Enum):
    TORCH = "torch"
    """Row by row with torch's own operations: any device, dtype and option."""
    VARLEN_PAGED = "varlen_paged"
    """One fused kernel for all rows, which follows the block table."""
    VARLEN_COPIED = "varlen_copied"
    """The same, over a copy of the rows' KV, where the kernel cannot follow pages of this size."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What the choice of kernel depends on, as the device and torch report it."""

    device_type: str
    capability: tuple[int, int] = (0, 0)
    flash: str | None = None
    """The FlashAttention that torch was told to use ("FA3", "FA4"); None: its own, version 2."""

    @classmethod
    def of(cls, device: torch.device) -> "Accelerator":
        if device.type != "cuda":
            return cls(device.type)
        return cls("cuda", torch.cuda.get_device_capability(device), current_flash_attention_impl())


def choose_kernel(
    accelerator: Accelerator, dtype: torch.dtype, head_dim: int, block_tokens: int, options: AttentionOptions
) -> Kernel:
    is_served = (
        accelerator.device_type == "cuda"
        and accelerator.capability >= _FLASH_CAPABILITY_MIN
        and dtype in _FLASH_DTYPES
        and head_dim <= _FLASH_HEAD_DIM_MAX
        and head_dim % _FLASH_HEAD_DIM_MULTIPLE == 0
        and options.is_plain
    )
    if not is_served:
        return Kernel.TORCH
    reads_pages = accelerator.flash == "FA3" or (
        accelerator.flash is None and block_tokens % _FLASH2_PAGE_MULTIPLE == 0
    )
    return Kernel.VARLEN_PAGED if reads_pages else Kernel.VARLEN_COPIED
