"""Two prefill and two decode workers in this process, joined by the faulty transport, any of which can be killed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from baton.rpc import common_pb2, worker_pb2
from baton.sampling import SamplingParams
from baton.settings import DecodeWorkerSettings, PrefillWorkerSettings
from decode_worker.worker import DecodeWorker
from kvtransfer.inproc import InprocHub
from prefill_worker.worker import PrefillWorker
from tests.decode_worker.pair import BASE, Candidate, RouterStream
from tests.kvtransfer.faulty import TRANSPORT, Faults

SETTINGS = {**BASE, "transports": (TRANSPORT,), "kv_blocks": 160, "chunk_tokens": 24, "sequences_max": 16}
IDLE_S_MAX = 60.0
LOST = "the decode worker was lost"
GONE = (grpc.aio.AioRpcError, asyncio.InvalidStateError)
"""What a write to a call raises that has ended."""
Worker = PrefillWorker | DecodeWorker


class LosingStream(RouterStream):
    """Tells all who wait when the decode worker is gone."""

    async def _read(self) -> None:
        await super()._read()
        for request_id in self._outputs:
            self._lose(request_id)

    def _lose(self, request_id: str) -> None:
        lost = worker_pb2.TokenOutput(finish_reason=common_pb2.FINISH_REASON_ERROR, error=LOST)
        self._outputs[request_id].put_nowait(lost)

    async def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        candidates: Iterable[Candidate] = (),
        request_id: str | None = None,
        **fields: Any,
    ) -> str:
        assert request_id is not None
        try:
            await super().submit(prompt, sampling, candidates, request_id, **fields)
        except GONE:
            self._lose(request_id)
        return request_id

    async def cancel(self, request_id: str) -> None:
        with contextlib.suppress(*GONE):
            await super().cancel(request_id)


@dataclass
class FaultyCluster:
    prefill: Sequence[PrefillWorker]
    decode: Sequence[DecodeWorker]
    streams: Sequence[LosingStream]
    """To the decode workers, in the same order."""
    faults: Faults

    def __post_init__(self) -> None:
        self.killed: list[Worker] = []

    @property
    def workers(self) -> list[Worker]:
        return [*self.prefill, *self.decode]

    async def kill(self, worker: Worker) -> None:
        """As others see it: its connections break, it answers nothing, it writes nothing."""
        self.killed.append(worker)
        host = worker._host
        self.faults.dead.append(host.engine.region)
        await host._grpc.server.stop(None)
        await host.channels.close()

    async def ask(
        self, decode: int, request_id: str, prompt: Sequence[int], sampling: SamplingParams, **fields: Any
    ) -> list[int]:
        """As a router does: with the decode worker lost, the other one goes on from the tokens it had sent."""
        candidates = fields.pop("candidates")
        tokens: list[int] = []
        for turn in (decode, 1 - decode):
            stream = self.streams[turn]
            if self.decode[turn] in self.killed:
                continue
            await stream.submit(prompt, sampling, candidates, request_id, generated=tokens, **fields)
            answer = await stream.answer(request_id)
            tokens += answer.token_ids
            if answer.error != LOST:
                assert answer.error == ""
                return tokens
        raise AssertionError("there is a decode worker left")

    async def cancel(self, request_id: str) -> None:
        """Wherever it is."""
        for worker, stream in zip(self.decode, self.streams, strict=True):
            if worker not in self.killed:
                await stream.cancel(request_id)

    async def check_idle(self) -> None:
        """No block of a living worker is in use, leaked or owned twice, and none is kept back."""
        await self.faults.settle()
        living = [worker for worker in self.workers if worker not in self.killed]
        deadline_s = asyncio.get_running_loop().time() + IDLE_S_MAX
        for worker in living:
            while (load := worker.info.load).kv_blocks_used or load.running_sequences or load.waiting_sequences:
                assert asyncio.get_running_loop().time() < deadline_s, f"{worker.info.role} keeps {load}"
                await asyncio.sleep(0.01)
            await worker._host.engine.call(lambda engine: engine.check_integrity())
            assert not worker._host.registry.get_sample_value("baton_kv_blocks_quarantined")


@contextlib.asynccontextmanager
async def faulty_cluster(
    model: Path, redis_url: str, key_prefix: str, faults: Faults, **settings: Any
) -> AsyncIterator[FaultyCluster]:
    """The faults' transport must be what the registry calls inproc."""
    common = {**SETTINGS, "model": str(model), "redis_url": redis_url, "key_prefix": key_prefix, **settings}
    hub = InprocHub()
    prefill = [PrefillWorker(PrefillWorkerSettings(**common), hub=hub) for _ in range(2)]
    decode = [DecodeWorker(DecodeWorkerSettings(**common, local_prefill_tokens_max=8), hub=hub) for _ in range(2)]
    streams: list[LosingStream] = []
    try:
        await asyncio.gather(*(worker.start() for worker in [*prefill, *decode]))
        streams += [LosingStream(worker.address) for worker in decode]
        yield FaultyCluster(prefill, decode, streams, faults)
    finally:
        for stream in streams:
            await stream.close()
        for worker in [*decode, *prefill]:
            await worker.stop()
        await faults.settle()
