"""Settings of every service: flags first, then BATON_* environment variables, then a YAML file.

One frozen object per service, read once at the start, checked as it is built and passed in. A name is
the same everywhere: the flag `--kv-blocks`, the variable `BATON_KV_BLOCKS`, the YAML key `kv_blocks`.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from baton.errors import SettingsError

Port = int
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def bytes_from(given: Any) -> Any:
    """A size as people write it, like 4GiB or 500 MB, in bytes; all else as it came."""
    if not isinstance(given, str):
        return given
    found = _SIZE.fullmatch(given)
    if found is None or (unit := _UNITS.get(found[2].lower())) is None:
        raise ValueError("a size looks like 1048576, 500MB or 4GiB")
    return int(found[1]) * unit if found[1].isdecimal() else round(float(found[1]) * unit)


BYTES = BeforeValidator(bytes_from)
Bytes = Annotated[int, BYTES]
TransportName = Literal["inproc", "shm", "nixl", "ucx", "tcp"]
RECALL_MODEL = "recall"
"""Stands for the bundled demo model wherever a model directory or id is asked for."""


class ServiceSettings(BaseSettings):
    """What every process needs to know to be part of a cluster."""

    model_config = SettingsConfigDict(env_prefix="BATON_", frozen=True, extra="forbid", hide_input_in_errors=True)
    config_file: ClassVar[Path | None] = None

    model: str = Field(
        RECALL_MODEL, min_length=1, description="Hugging Face directory or hub id; 'recall' is the bundled demo model"
    )
    served_model_name: str | None = Field(None, description="Name that clients use; default: the model as given")
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis that coordinates the cluster")
    key_prefix: str = Field("baton", min_length=1, description="All Redis keys start with it")
    host: str = Field("127.0.0.1", description="Address to listen on")
    advertise_host: str | None = Field(None, description="Address that others reach this process at; default: host")
    grpc_port: Port = Field(0, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    cluster_secret: SecretStr | None = Field(
        None, description="What workers prove to each other that they belong together with; unset: anybody may ask"
    )
    cluster_secret_file: Path | None = Field(None, description="File that holds it; read at start")
    drain_timeout_s: float = Field(30, ge=0, description="How long running requests may take to finish at shutdown")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged at least")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the checkpoint")

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model

    @property
    def reachable_host(self) -> str:
        return self.advertise_host or self.host

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        assert isinstance(env_settings, EnvSettingsSource)
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        if cls.config_file is not None:
            sources += (YamlConfigSettingsSource(settings_cls, cls.config_file),)
        return sources


class WorkerSettings(ServiceSettings):
    """Shared by prefill and decode workers."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="auto: as in the checkpoint")
    threads: int = Field(0, ge=0, description="torch threads; 0: torch's own choice")
    block_tokens: int = Field(
        32, ge=1, le=1024, description="Tokens in one KV block; where workers differ, KV is cut anew on its way"
    )
    kv_blocks: int = Field(0, ge=0, description="Blocks in the pool; 0: from kv_memory_bytes")
    kv_memory_bytes: Bytes = Field(0, ge=0, description="Pool size; 0: 1 GiB on CPU, 90 % of what is free on a GPU")
    context_length_max: int = Field(0, ge=0, description="Longest prompt plus completion; 0: the model's own limit")
    chunk_tokens: int = Field(512, ge=1, description="Tokens computed in one engine step at most")
    sequences_max: int = Field(256, ge=1, description="Sequences in one batch at most")
    waiting_max: int = Field(1024, ge=1, description="Requests that may wait; past it they are refused")
    prefix_cache: bool = Field(True, description="Reuse the KV of prompts that start alike")
    ddr_bytes: Bytes = Field(0, ge=0, description="Host memory for KV blocks that leave the pool; 0: none")
    ssd_dir: Path | None = Field(
        None, description="Directory on a local disk; each worker keeps KV in one file there and finds it again"
    )
    ssd_bytes: Bytes = Field(0, ge=0, description="Size of that file; 0: none. Blocks get there through ddr_bytes")
    kv_compression: Literal["none", "int8"] = Field(
        "none", description="How KV is kept below HBM; int8 is half to a quarter of the size, and not exact"
    )
    tier_bytes_in_flight_max: Bytes = Field(
        0,
        ge=0,
        description="KV bytes that may be on their way between tiers at one time; 0: what two steps of prompts make, "
        "64 MiB at least",
    )
    fetch: bool = Field(True, description="Fetch prefixes from other workers where the router finds that quicker")
    transports: tuple[TransportName, ...] = Field(
        ("shm", "nixl", "ucx", "tcp"), min_length=1, description="Allowed KV transports, best first"
    )
    transport: Literal["auto", TransportName] = Field(
        "auto", description="The one KV transport to use, or not to serve; auto: the best of `transports` that works"
    )
    transport_port: Port = Field(0, ge=0, le=65535, description="Where KV blocks come in by tcp; 0 picks a free one")
    transport_tls_certificate: Path | None = Field(
        None, description="Certificate for tcp transfers (PEM); unset: no TLS"
    )
    transport_tls_key: Path | None = Field(None, description="Its key (PEM)")
    transport_tls_authority: Path | None = Field(None, description="Who signs the certificates of all workers (PEM)")
    transfer_bytes_in_flight_max: Bytes = Field(
        64 * 2**20, ge=1, description="KV bytes of one request that may be on their way at one time"
    )
    link_bytes_per_s_min: float = Field(
        0, ge=0, description="A link that tests slower is called slow; 0: by what its transport should reach"
    )
    verify: Literal["always", "sampled", "never"] = Field(
        "always", description="Which KV blocks are checked against their digests where they land"
    )
    verify_ddr: Literal["always", "sampled", "never"] = Field(
        "sampled",
        description="Which KV blocks are checked as they come up from host memory; those from the SSD always are",
    )
    metrics_port: Port | None = Field(None, ge=0, le=65535, description="Prometheus port; unset: none")
    worker_id: str | None = Field(None, description="Default: role and a random suffix")
    pool: str = Field("default", min_length=1, description="Pool this worker belongs to, such as its GPU type")
    self_test: bool = Field(True, description="Measure prefill and decode speed at start, before serving")

    @model_validator(mode="after")
    def can_be_reached(self) -> Self:
        if self.reachable_host in ("0.0.0.0", "::", "[::]"):
            raise ValueError(f"others cannot reach this worker at {self.reachable_host}; set advertise_host")
        return self

    @model_validator(mode="after")
    def tls_is_complete(self) -> Self:
        files = (self.transport_tls_certificate, self.transport_tls_key, self.transport_tls_authority)
        if any(files) and not all(files):
            raise ValueError("transport_tls_certificate, _key and _authority belong together: give all or none")
        return self

    @model_validator(mode="after")
    def tiers_are_complete(self) -> Self:
        if bool(self.ssd_bytes) != (self.ssd_dir is not None):
            raise ValueError("ssd_bytes and ssd_dir belong together: give both or neither")
        if self.ssd_bytes and not self.ddr_bytes:
            raise ValueError("ssd_bytes needs ddr_bytes: blocks go down to the SSD through host memory")
        return self

    @property
    def allowed_transports(self) -> tuple[TransportName, ...]:
        """Best first."""
        return self.transports if self.transport == "auto" else (self.transport,)


class PrefillWorkerSettings(WorkerSettings):
    send: Literal["streamed", "after_prefill"] = Field(
        "streamed", description="KV leaves while the prompt is computed, or after it, to compare with"
    )
    prefill_timeout_s: float = Field(600, gt=0, description="Longest that a ticket may hold blocks")


class DecodeWorkerSettings(WorkerSettings):
    local_prefill_tokens_max: int = Field(
        64, ge=0, description="With at most this many uncached prompt tokens, prefill on the decode worker itself"
    )
    prefill_timeout_s: float = Field(600, gt=0, description="Longest to wait for one prefill worker")


Policy = Literal["least-added-latency", "round-robin", "random", "least-loaded", "prefix-affinity", "block-cost"]
"""How requests are placed; the first is Baton's own, the others are there to compare with."""


class UpstreamSettings(BaseModel):
    """An OpenAI-compatible endpoint that takes what this cluster cannot."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: str = Field(description="Base URL, up to and with /v1")
    model: str | None = Field(None, description="The model's name there; default: the same")
    api_key_file: Path | None = Field(None, description="File that holds the key to send; read at start")
    use: Literal["overflow", "fallback", "always"] = Field(
        "overflow",
        description="overflow: when the queue is full or no worker is ready; fallback: when no worker is ready; always",
    )
    timeout_s: float = Field(600, gt=0, description="Longest that one request may take there")


class ModelSettings(BaseModel):
    """One model that a router serves."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(min_length=1, description="Name that clients use and that its workers serve it by")
    model: str = Field(description="Hugging Face directory or hub id, for tokenizer and chat template")
    aliases: tuple[str, ...] = Field((), description="Other names for it")
    context_length_max: int = Field(0, ge=0, description="Longest prompt plus completion; 0: the model's own limit")
    upstream: UpstreamSettings | None = Field(None, description="Endpoint that takes what this cluster cannot")

    @property
    def names(self) -> tuple[str, ...]:
        """All that clients may call it."""
        return (self.name, *self.aliases)


class RouterSettings(ServiceSettings):
    http_port: Port = Field(8000, ge=0, le=65535, description="OpenAI-compatible HTTP port; 0 picks a free one")
    requests_max: int = Field(4096, ge=1, description="Requests in flight at most; past it: 429")
    request_timeout_s: float = Field(3600, gt=0, description="Longest that one request may take; past it: 504")
    prompt_bytes_max: Bytes = Field(4 * 2**20, ge=1, description="Longest prompt text")
    body_bytes_max: Bytes = Field(32 * 2**20, ge=1, description="Largest HTTP body or gRPC message")
    models: tuple[ModelSettings, ...] = Field(
        (), description="Models to serve, in the YAML file or as JSON; default: the one that `model` names"
    )
    policy: Policy = Field("least-added-latency", description="How requests are placed on workers")
    index_blocks_max: int = Field(4_000_000, ge=1, description="KV blocks that the prefix index knows at most")
    decisions_max: int = Field(10_000, ge=0, description="Placement decisions kept for `baton explain`")
    failover_max: int = Field(3, ge=0, description="How often one sequence is placed anew after a worker failed it")
    failover_wait_s: float = Field(
        30, ge=0, description="Longest that a sequence whose worker failed waits for another that can take it"
    )
    tenants_file: Path | None = Field(None, description="YAML file with tenants, API keys and limits; unset: open")
    cache_bytes_max: Bytes = Field(
        2**30,
        ge=0,
        description="What requests may have kept by `cache` on each worker, where there is no tenants file; 0: nothing",
    )
    queue_max: int = Field(1024, ge=0, description="Requests that may wait at the router for their turn")
    worker_queue_s: float = Field(
        1.0, gt=0, description="Requests wait at the router while every worker's predicted queue is longer"
    )

    @property
    def served_models(self) -> tuple[ModelSettings, ...]:
        return self.models or (ModelSettings.model_validate({"name": self.model_name, "model": self.model}),)

    @model_validator(mode="after")
    def model_names_are_unique(self) -> Self:
        names = Counter(name for model in self.served_models for name in model.names)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"models: the name {twice[0]!r} is given twice; names and aliases must differ")
        return self


class UpSettings(RouterSettings, PrefillWorkerSettings, DecodeWorkerSettings):
    """`baton up`: a router, its workers and, where no URL is given, a Redis of its own.

    `host` is the router's; the workers listen where only the others of the deployment need to reach them.
    """

    redis_url: str | None = Field(None, description="Redis to use; default: an embedded one")  # type: ignore[assignment]
    ray_address: str | None = Field(None, description="Ray cluster to run on; default: a local Ray")
    prefill: int = Field(1, ge=0, description="Prefill workers")
    decode: int = Field(1, ge=1, description="Decode workers")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs that Ray sets aside for each worker")

    @model_validator(mode="after")
    def can_be_reached(self) -> Self:
        return self


Settings = TypeVar("Settings", bound=ServiceSettings)


def load_settings(kind: type[Settings], flags: dict[str, Any], config: Path | None = None) -> Settings:
    """Builds a service's settings from flags (None: not given), the environment and a YAML file.

    Raises SettingsError with a sentence that names every bad value.
    """
    if config is not None and not config.is_file():
        raise SettingsError(f"The configuration file {config} does not exist.")
    kind = type(kind.__name__, (kind,), {"config_file": config, "__module__": kind.__module__, "__doc__": kind.__doc__})
    try:
        return kind(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        problems = "; ".join(
            ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, "))))
            for e in error.errors()
        )
        raise SettingsError(f"These settings cannot be used: {problems}.") from None
    except Exception as error:  # the YAML source raises what the YAML library raises
        raise SettingsError(f"The settings could not be read: {error}") from None
