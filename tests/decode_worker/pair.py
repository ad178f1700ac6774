"""A prefill and a decode worker in this process, as real as in two: real engines on their own threads, real
gRPC, real transports, a real Redis. `RouterStream` speaks to the decode worker as a router would."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from baton.rpc import common_pb2, worker_pb2, worker_pb2_grpc
from baton.rpc.convert import sampling_to_proto
from baton.rpc.streams import SerialWriter
from baton.sampling import SamplingParams
from baton.settings import DecodeWorkerSettings, PrefillWorkerSettings
from decode_worker.worker import DecodeWorker
from kvtransfer.inproc import InprocHub
from prefill_worker.worker import PrefillWorker

TIMEOUT_S = 60
AT_ONCE_S = 5.0
"""Longer than it takes on a busy machine, and shorter than any of the workers' own timeouts."""
BASE: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "block_tokens": 8,
    "kv_blocks": 96,
    "chunk_tokens": 32,
    "drain_timeout_s": 20,
    "self_test": False,
    "transports": ("shm", "tcp"),
}


@dataclass
class Answer:
    token_ids: list[int]
    finish_reason: int
    timeline: common_pb2.Timeline
    cached_tokens: int
    error: str
    messages: list[worker_pb2.TokenOutput]


Candidate = str | worker_pb2.PrefillCandidate
"""By its address alone, or with all that is said of it."""


def _candidate(candidate: Candidate) -> worker_pb2.PrefillCandidate:
    if isinstance(candidate, str):
        return worker_pb2.PrefillCandidate(worker_id=f"worker at {candidate}", address=candidate)
    return candidate


class RouterStream:
    """One router's Serve stream."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._call = worker_pb2_grpc.DecodeWorkerStub(self._channel).Serve()
        self._write = SerialWriter(self._call.write)
        self._outputs: dict[str, asyncio.Queue[worker_pb2.TokenOutput]] = {}
        self._reader = asyncio.ensure_future(self._read())
        self._ids = itertools.count()

    async def _read(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            while isinstance(response := await self._call.read(), worker_pb2.ServeResponse):
                for output in response.outputs:
                    self._outputs[output.request_id].put_nowait(output)

    async def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        candidates: Iterable[Candidate] = (),
        request_id: str | None = None,
        **fields: Any,
    ) -> str:
        """`fields` are more of Submit's."""
        request_id = request_id or f"r{id(self):x}-{next(self._ids)}"
        self._outputs.setdefault(request_id, asyncio.Queue())
        submit = worker_pb2.Submit(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling_to_proto(sampling),
            prefill_candidates=map(_candidate, candidates),
            **fields,
        )
        await self._write(worker_pb2.ServeRequest(submit=submit))
        return request_id

    async def cancel(self, request_id: str) -> None:
        await self._write(worker_pb2.ServeRequest(cancel=worker_pb2.Cancel(request_id=request_id)))

    async def next_output(self, request_id: str) -> worker_pb2.TokenOutput:
        return await asyncio.wait_for(self._outputs[request_id].get(), TIMEOUT_S)

    async def answer(self, request_id: str) -> Answer:
        messages = [await self.next_output(request_id)]
        while messages[-1].finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED:
            messages.append(await self.next_output(request_id))
        last = messages[-1]
        tokens = [token for message in messages for token in message.token_ids]
        return Answer(tokens, last.finish_reason, last.timeline, last.cached_tokens, last.error, messages)

    async def ask(
        self, prompt: Sequence[int], sampling: SamplingParams, candidates: Iterable[Candidate] = (), **fields: Any
    ) -> Answer:
        return await self.answer(await self.submit(prompt, sampling, candidates, **fields))

    async def close(self) -> None:
        self._call.cancel()
        await self._reader
        await self._channel.close()


@dataclass
class Pair:
    prefill: PrefillWorker
    decode: DecodeWorker
    stream: RouterStream

    async def ask(self, prompt: Sequence[int], sampling: SamplingParams, **fields: Any) -> Answer:
        return await self.stream.ask(prompt, sampling, [self.prefill.address], **fields)

    async def until_idle(self, within_s: float = TIMEOUT_S) -> None:
        """Until neither worker's pool has a block in use; each free block is accounted for."""
        deadline_s = asyncio.get_running_loop().time() + within_s
        for worker in (self.prefill, self.decode):
            while (load := worker.info.load).kv_blocks_used or load.running_sequences or load.waiting_sequences:
                assert asyncio.get_running_loop().time() < deadline_s, f"{worker.info.role}: {load}"
                await asyncio.sleep(0.01)

    async def check_integrity(self) -> None:
        """Of both engines: who holds what."""
        for worker in (self.prefill, self.decode):
            await worker._host.engine.call(lambda engine: engine.check_integrity())


async def until(condition: Callable[[], bool], within_s: float = TIMEOUT_S) -> None:
    deadline_s = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline_s
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running_pair(
    model: Path, redis_url: str, key_prefix: str, prefill: dict[str, Any] | None = None, **both: Any
) -> AsyncIterator[Pair]:
    """`prefill` are settings of the prefill worker alone. On leaving, checks that no block is in use."""
    common = {**BASE, "model": str(model), "redis_url": redis_url, "key_prefix": key_prefix, **both}
    decode_only = ("local_prefill_tokens_max",)
    of_prefill = {key: value for key, value in common.items() if key not in decode_only} | (prefill or {})
    hub = InprocHub()
    workers = (
        PrefillWorker(PrefillWorkerSettings(**of_prefill), hub=hub),
        DecodeWorker(DecodeWorkerSettings(**common), hub=hub),
    )
    try:
        for worker in workers:
            await worker.start()
        stream = RouterStream(workers[1].address)
        pair = Pair(*workers, stream)
        try:
            yield pair
            await pair.until_idle()
            await pair.check_integrity()
        finally:
            await stream.close()
    finally:
        for worker in reversed(workers):
            await worker.stop()
