"""A worker's numbers as the cluster and its operators are told them."""

from baton.cluster.worker_info import Load, Role, State
from baton.ids import WorkerId
from baton.rpc import worker_pb2
from engine.interface import EngineStats

_STATES = {
    "starting": worker_pb2.WORKER_STATE_STARTING,
    "ready": worker_pb2.WORKER_STATE_READY,
    "draining": worker_pb2.WORKER_STATE_DRAINING,
}


def load_of(stats: EngineStats, arrivals_per_s: float) -> Load:
    return Load(
        running_sequences=stats.running_sequences,
        waiting_sequences=stats.waiting_sequences,
        waiting_tokens=stats.waiting_tokens,
        waiting_token_context=stats.waiting_token_context,
        kv_blocks_used=stats.kv_blocks_used,
        kv_blocks_wanted=stats.kv_blocks_wanted,
        kv_blocks_cached=stats.kv_blocks_cached,
        kv_tokens=stats.kv_tokens,
        arrivals_per_s=arrivals_per_s,
    )


def status_of(worker_id: WorkerId, role: Role, model: str, state: State, stats: EngineStats) -> worker_pb2.WorkerStatus:
    return worker_pb2.WorkerStatus(
        worker_id=worker_id,
        role=role,
        model=model,
        state=_STATES[state],
        running_sequences=stats.running_sequences,
        waiting_sequences=stats.waiting_sequences,
        waiting_tokens=stats.waiting_tokens,
        kv_blocks_total=stats.kv_blocks_total,
        kv_blocks_used=stats.kv_blocks_used,
        kv_blocks_cached=stats.kv_blocks_cached,
    )
