"""Builds what lies below a worker's pool, as its settings say."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from baton.errors import SettingsError
from baton.ids import BlockId
from baton.layout import KVLayout
from baton.settings import WorkerSettings
from engine.device_copier import DeviceCopier
from engine.device_region import DeviceRegion
from engine.interface import ModelInfo
from kvcache.restore_plan import RestoreCosts
from kvcache.tiers.interface import BlockCopier, LowerTiers
from kvcache.tiers.opening import open_tiers
from kvcache.tiers.rows.copier import HostCopier
from kvtransfer.region import HostRegion

STEPS_IN_FLIGHT = 2
BYTES_IN_FLIGHT_MIN = 64 * 2**20


class LateCosts:
    """What a worker's latency model says, for tiers that are made before there is an engine to ask."""

    def __init__(self) -> None:
        self.costs: Callable[[], RestoreCosts] | None = None

    def block_s(self, depth: int) -> float:
        """Computing the block at this depth of a prompt, as one of many."""
        return 0.0 if self.costs is None else self.costs().block_s(depth)


def open_lower_tiers(
    settings: WorkerSettings, model: ModelInfo, region: HostRegion | DeviceRegion, costs: LateCosts
) -> LowerTiers | None:
    """None: the settings ask for none. Raises SettingsError where they cannot be had."""
    if not settings.ddr_bytes or not settings.prefix_cache:
        return None
    on_cuda = isinstance(region, DeviceRegion) and region.tensor.is_cuda
    tiers = open_tiers(
        layout=model.layout,
        fingerprint=model.fingerprint,
        ddr_bytes=settings.ddr_bytes,
        ssd_dir=settings.ssd_dir,
        ssd_bytes=settings.ssd_bytes,
        kv_compression=settings.kv_compression,
        bytes_in_flight_max=bytes_in_flight_max(settings, model.layout),
        copier=_copier(region),
        digests=_digests(region),
        saved_s=costs.block_s,
        verify_ddr=settings.verify_ddr,
        pin=pin_for_device if on_cuda else None,
    )
    if tiers is None:
        raise SettingsError(f"ddr_bytes: one KV block takes more than {settings.ddr_bytes} bytes.")
    return tiers


def bytes_in_flight_max(settings: WorkerSettings, layout: KVLayout) -> int:
    """One step may evict as much as it computes, and what is evicted past this is dropped."""
    steps_bytes = STEPS_IN_FLIGHT * settings.chunk_tokens * layout.block_bytes // layout.block_tokens
    return settings.tier_bytes_in_flight_max or max(BYTES_IN_FLIGHT_MIN, steps_bytes)


def _copier(region: HostRegion | DeviceRegion) -> BlockCopier:
    if isinstance(region, DeviceRegion):
        return DeviceCopier(region)
    return HostCopier(region.memory, region.layout)


def _digests(region: HostRegion | DeviceRegion) -> Callable[[Sequence[BlockId], range], Sequence[int]]:
    return region.digests


def pin_for_device(memory: memoryview) -> None:
    """Locks the pages in memory, so that a device reads and writes them at full speed. They stay locked until the
    process ends or they are unmapped. Raises OSError if the system does not let it."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    error = torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)
    if int(error) != 0:
        raise OSError(f"{memory.nbytes} bytes of host memory could not be locked (CUDA error {int(error)}).")
