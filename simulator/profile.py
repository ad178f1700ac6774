"""What a simulated cluster is made of: how fast its workers are, how much they hold, how far apart they are."""

from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.errors import SettingsError
from baton.latency import TransferCost, WorkerLatency
from baton.settings import Bytes
from kvcache.tiers.interface import LowerTier

SUFFIX = ".yaml"
ROLES = ("prefill", "decode")
KV_BLOCKS_MIN = 2


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoleProfile(_Part):
    """The workers of one role; the fields are those of WorkerSettings."""

    kv_blocks: int = Field(ge=KV_BLOCKS_MIN)
    chunk_tokens: int = Field(ge=1)
    sequences_max: int = Field(ge=1)
    waiting_max: int = Field(1024, ge=1)


class TierSpeed(_Part):
    restore: TransferCost
    """Out of it, into HBM."""
    store: TransferCost
    """Down into it, from the tier above."""


class TierProfile(_Part):
    """The tiers below a worker's HBM. How large they are is another question."""

    ddr: TierSpeed
    ssd: TierSpeed
    bytes_in_flight_max: Bytes = Field(ge=1)
    """As WorkerSettings.tier_bytes_in_flight_max."""

    def of(self, tier: LowerTier) -> TierSpeed:
        return self.ddr if tier == "ddr" else self.ssd


class Profile(_Part):
    model: str
    layers: int = Field(ge=1)
    context_length: int = Field(ge=2)
    kv_token_bytes: int = Field(ge=1)
    """Of keys and values, all layers together."""
    latency: WorkerLatency
    """What workers really need, and what they publish until they have measured."""
    prefill: RoleProfile
    decode: RoleProfile
    tiers: TierProfile | None = None
    """None: nobody knows how fast they would be, so none can be replayed."""
    local_prefill_tokens_max: int = Field(64, ge=0)
    """As in DecodeWorkerSettings."""
    message_s: float = Field(ge=0)
    """A message between two processes, one way."""
    event_s: float = Field(ge=0)
    """From a change of a worker's cache until the router's index knows of it."""

    def with_kv_blocks(self, kv_blocks: int | None) -> Self:
        """The same with another pool on every worker; None: as it is. Raises SettingsError."""
        if kv_blocks is None:
            return self
        if kv_blocks < KV_BLOCKS_MIN:
            raise SettingsError(f"A worker needs {KV_BLOCKS_MIN} KV blocks at least.")
        pools = {role: getattr(self, role).model_copy(update={"kv_blocks": kv_blocks}) for role in ROLES}
        return self.model_copy(update=pools)


def load_profile(name: str) -> Profile:
    """A YAML file, or the name of one that comes with Baton. Raises SettingsError with a sentence."""
    try:
        return Profile.model_validate(_read(name))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise SettingsError(f"The profile {name} cannot be used: {problems}.") from None


def _read(name: str) -> Any:
    shipped = resources.files("simulator") / "profiles" / f"{name}{SUFFIX}"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise SettingsError(f"There is no profile {name}: name a YAML file, or one of {', '.join(shipped_profiles())}.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"The profile {name} cannot be read: {error}") from None


def shipped_profiles() -> list[str]:
    files = (resources.files("simulator") / "profiles").iterdir()
    return sorted(file.name.removesuffix(SUFFIX) for file in files if file.name.endswith(SUFFIX))
