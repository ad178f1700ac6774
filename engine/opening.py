"""Makes an engine as a worker's settings say: the model, its pool, and the tiers below it."""

from collections.abc import Sequence

import torch

from baton.layout import PROBE_BLOCKS, KVLayout
from baton.settings import WorkerSettings
from engine.batch import Draw, Drawn
from engine.core import LocalEngine
from engine.device_region import DeviceRegion
from engine.digests import Digester, RegionDigester
from engine.interface import LayerListener, ModelInfo
from engine.model.loader import LoadedModel, load_model
from engine.pool_size import pool_blocks
from engine.runner import ModelRunner, StepLogits, kv_layout
from engine.sampler import sample
from engine.scheduler import Limits
from engine.tiers import LateCosts, open_lower_tiers
from kvtransfer.region import HostRegion


def load_engine(settings: WorkerSettings, listener: LayerListener | None = None) -> LocalEngine[StepLogits]:
    """Loads the model and allocates its pool. Raises SettingsError, UnsupportedModel or TransferError."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    loaded = load_model(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    return open_engine(loaded, settings, listener)


def open_engine(
    loaded: LoadedModel, settings: WorkerSettings, listener: LayerListener | None = None
) -> LocalEngine[StepLogits]:
    """Allocates a pool for a model, and opens the tiers below it. Raises SettingsError."""
    model = _model_info(loaded, settings)
    region = _allocate(model.layout, loaded.device)
    digester = None if settings.verify == "never" else _digester_of(region)
    costs = LateCosts()
    tiers = open_lower_tiers(settings, model, region, costs)
    runner, limits = ModelRunner(loaded, region), Limits.of(settings)
    engine = LocalEngine(model, region, runner, _sample, limits, listener, digester=digester, tiers=tiers)
    costs.costs = engine.costs
    return engine


def _model_info(loaded: LoadedModel, settings: WorkerSettings) -> ModelInfo:
    facts, block_tokens = loaded.facts, settings.block_tokens
    limit = min(facts.context_length, settings.context_length_max or facts.context_length)
    block_bytes = kv_layout(loaded, block_tokens, 1).block_bytes
    blocks = pool_blocks(settings, block_bytes, limit, loaded.device)
    return ModelInfo(
        name=settings.model_name,
        fingerprint=facts.fingerprint,
        context_length=min(limit, blocks * block_tokens),
        vocabulary_size=facts.vocabulary_size,
        eos_token_ids=facts.eos_token_ids,
        layout=kv_layout(loaded, block_tokens, blocks + PROBE_BLOCKS),
    )


def _allocate(layout: KVLayout, device: torch.device) -> HostRegion | DeviceRegion:
    return HostRegion.allocate(layout) if device.type == "cpu" else DeviceRegion(layout, device)


def _digester_of(region: HostRegion | DeviceRegion) -> Digester:
    return RegionDigester(region) if isinstance(region, HostRegion) else region.digester


def _sample(logits: StepLogits, draws: Sequence[Draw]) -> list[Drawn]:
    return sample(logits.logits, draws)
