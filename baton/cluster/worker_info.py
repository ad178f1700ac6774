"""What a worker tells the cluster about itself: its membership record."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from baton.ids import WorkerId

Role = Literal["prefill", "decode"]
State = Literal["starting", "ready", "draining"]


class Load(BaseModel):
    """Refreshed with every heartbeat."""

    model_config = ConfigDict(frozen=True)

    running_sequences: int = 0
    waiting_sequences: int = 0
    waiting_tokens: int = 0
    """Prompt tokens still to compute."""
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0


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
    epoch: str
    """Drawn anew at each start of the process."""
    load: Load = Load()

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"
