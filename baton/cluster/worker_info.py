"""What a worker tells the cluster about itself: its membership record."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from baton.ids import WorkerId
from baton.latency import DEFAULT_LATENCY, WorkerLatency

Role = Literal["prefill", "decode"]
State = Literal["starting", "ready", "draining"]


class Load(BaseModel):
    """Refreshed with every heartbeat."""

    model_config = ConfigDict(frozen=True)

    running_sequences: int = 0
    waiting_sequences: int = 0
    waiting_tokens: int = 0
    """Prompt tokens still to compute."""
    waiting_token_context: float = 0.0
    """The sum of `new * context` over these tokens, as PrefillCost has it: long prompts take more than their share."""
    kv_blocks_used: int = 0
    kv_blocks_wanted: int = 0
    """That the sequences which wait for room will take."""
    kv_blocks_cached: int = 0
    kv_tokens: int = 0
    """KV that a decode step reads: all tokens of the running sequences."""
    arrivals_per_s: float = 0.0
    """Requests that came to it, from whatever router, over the last half minute or so."""


class WorkerInfo(BaseModel):
    model_config = ConfigDict(frozen=True)

    worker_id: WorkerId
    role: Role
    state: State
    address: str
    """HOST:PORT of its gRPC server."""
    model: str
    fingerprint: str
    context_length: int
    vocabulary_size: int
    block_tokens: int
    kv_dtype: str
    kv_blocks_total: int
    kv_block_bytes: int = 0
    layers: int = 1
    """Of the model; KV leaves a prefill worker one layer at a time."""
    chunk_tokens: int = 512
    sequences_max: int = 256
    pool: str = "default"
    """Workers of one kind, such as one GPU type; operators choose the name."""
    fetches: bool = False
    """Whether it gets prefixes from other workers where it is told to (FetchPlan)."""
    latency: WorkerLatency = DEFAULT_LATENCY
    epoch: str
    """Drawn anew at each start of the process."""
    cache_sequence: int = 0
    """Of the last batch of KV events it made, so that routers notice one that got lost."""
    load: Load = Load()

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"
