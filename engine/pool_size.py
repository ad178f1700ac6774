"""How many KV blocks a worker keeps."""

import torch

from baton.errors import SettingsError
from baton.settings import WorkerSettings

CPU_MEMORY_BYTES = 2**30
GPU_MEMORY_PERCENT = 90
"""Of what is free once the weights are loaded; the rest is for activations."""


def pool_blocks(settings: WorkerSettings, block_bytes: int, context_length: int, device: torch.device) -> int:
    """As many as are asked for; else as fit into the memory that is asked for; else as fit into a default for
    the device, but not more than a full batch of the longest sequences fills.

    Raises SettingsError if not even one block fits.
    """
    if settings.kv_blocks:
        return settings.kv_blocks
    memory_bytes = settings.kv_memory_bytes or default_memory_bytes(device)
    blocks = memory_bytes // block_bytes
    if not blocks:
        raise SettingsError(f"kv_memory_bytes: one KV block takes {block_bytes} bytes, but there are {memory_bytes}.")
    if settings.kv_memory_bytes:
        return blocks
    return min(blocks, settings.sequences_max * -(-context_length // settings.block_tokens))


def default_memory_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_MEMORY_BYTES
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes * GPU_MEMORY_PERCENT // 100
