"""How the workers are right now, asked of each of them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc.aio

from baton.cluster.worker_info import WorkerInfo
from baton.rpc import worker_pb2, worker_pb2_grpc
from baton.service import CHANNEL_OPTIONS

STATUS_TIMEOUT_S = 2.0
_STATES = {
    worker_pb2.WORKER_STATE_STARTING: "starting",
    worker_pb2.WORKER_STATE_READY: "ready",
    worker_pb2.WORKER_STATE_DRAINING: "draining",
}
_NUMBERS = (
    *("running_sequences", "waiting_sequences", "waiting_tokens"),
    *("kv_blocks_total", "kv_blocks_used", "kv_blocks_cached"),
)


async def worker_statuses(workers: Sequence[WorkerInfo]) -> list[dict[str, Any]]:
    """One entry a worker, within STATUS_TIMEOUT_S; one that does not answer is not `reachable`, and its other
    fields are what it last told the cluster."""
    return list(await asyncio.gather(*map(_status, workers)))


async def _status(worker: WorkerInfo) -> dict[str, Any]:
    known = _from_membership(worker)
    try:
        async with grpc.aio.insecure_channel(worker.address, options=CHANNEL_OPTIONS) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            status = await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=STATUS_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return known | {"reachable": False, "error": f"GetStatus failed: {error.code().name}"}
    return known | _from_worker(status) | {"reachable": True, "error": None}


def _from_membership(worker: WorkerInfo) -> dict[str, Any]:
    return {
        "worker_id": worker.worker_id,
        "role": worker.role,
        "model": worker.model,
        "pool": worker.pool,
        "state": worker.state,
        "address": worker.address,
        "kv_blocks_total": worker.kv_blocks_total,
        **worker.load.model_dump(),
    }


def _from_worker(status: worker_pb2.WorkerStatus) -> dict[str, Any]:
    numbers = {name: getattr(status, name) for name in _NUMBERS}
    return {"state": _STATES.get(status.state, "unknown"), **numbers}
