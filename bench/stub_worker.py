"""A decode worker without an engine: every step each of its sequences gets a token, for next to no work.

What a router costs can then be measured alone. It speaks the workers' protocol over real gRPC.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from baton.clock import monotonic
from baton.cluster.worker_info import WorkerInfo
from baton.ids import WorkerId
from baton.latency import DecodeCost, PrefillCost, TransferCost, WorkerLatency
from baton.rpc import common_pb2, worker_pb2, worker_pb2_grpc
from baton.service import CHANNEL_OPTIONS

CONTEXT_LENGTH = 32_768
LENGTH = common_pb2.FINISH_REASON_LENGTH
QUICK = WorkerLatency(
    PrefillCost(chunk_s=1e-6, token_s=1e-9, token_context_s=0.0),
    DecodeCost(step_s=1e-3, sequence_s=1e-7, kv_token_s=0.0),
    TransferCost(latency_s=1e-6, bytes_per_s=1e12),
)
"""So that nobody waits at the router for a worker to have time."""


@dataclass(slots=True)
class _Running:
    at: int
    """Where in the text it is."""
    left: int
    is_new: bool = True


class StubWorker(worker_pb2_grpc.DecodeWorkerServicer):
    """An async context manager. Its sequences say `text` from some place on, over and over, a token a step;
    a step takes `step_s`, and longer where the router does not keep up reading."""

    def __init__(self, name: str, model: str, vocabulary: int, text: Sequence[int], step_s: float) -> None:
        self._name, self._model, self._vocabulary = name, model, vocabulary
        self._text, self._step_s = text, step_s
        self._server = grpc.aio.server(options=CHANNEL_OPTIONS)
        self._port = 0

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=WorkerId(self._name),
            role="decode",
            state="ready",
            address=f"127.0.0.1:{self._port}",
            model=self._model,
            fingerprint="stub",
            context_length=CONTEXT_LENGTH,
            vocabulary_size=self._vocabulary,
            block_tokens=32,
            kv_dtype="float32",
            kv_blocks_total=1_000_000,
            sequences_max=4096,
            latency=QUICK,
            epoch="1",
        )

    async def __aenter__(self) -> "StubWorker":
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    async def Serve(self, request_iterator: AsyncIterator[worker_pb2.ServeRequest], context: Any) -> None:  # noqa: N802
        running: dict[str, _Running] = {}
        has_work = asyncio.Event()
        stepping = asyncio.create_task(self._run(running, has_work, context), name=f"steps of {self._name}")
        try:
            async for message in request_iterator:
                self._take(message, running)
                has_work.set()
        finally:
            stepping.cancel()
            await asyncio.gather(stepping, return_exceptions=True)

    def _take(self, message: worker_pb2.ServeRequest, running: dict[str, _Running]) -> None:
        if message.HasField("cancel"):
            running.pop(message.cancel.request_id, None)
            return
        submit = message.submit
        place = len(submit.prompt) * 7919 + len(running) * 104_729  # anywhere, but different for each
        running[submit.request_id] = _Running(place % len(self._text), submit.sampling.max_tokens)

    async def _run(self, running: dict[str, _Running], has_work: asyncio.Event, context: Any) -> None:
        while True:
            await has_work.wait()
            next_s = monotonic() + self._step_s
            await context.write(worker_pb2.ServeResponse(outputs=self._step(running)))
            if not running:
                has_work.clear()
            await asyncio.sleep(max(0.0, next_s - monotonic()))

    def _step(self, running: dict[str, _Running]) -> list[worker_pb2.TokenOutput]:
        outputs = [self._output(request_id, sequence) for request_id, sequence in running.items()]
        for request_id in [each.request_id for each in outputs if each.finish_reason]:
            del running[request_id]
        return outputs

    def _output(self, request_id: str, sequence: _Running) -> worker_pb2.TokenOutput:
        output = worker_pb2.TokenOutput(request_id=request_id, token_ids=[self._text[sequence.at]])
        sequence.at = (sequence.at + 1) % len(self._text)
        sequence.left -= 1
        if sequence.is_new:
            sequence.is_new, output.cached_tokens = False, 32
        if sequence.left <= 0:
            output.finish_reason = LENGTH
            output.timeline.decode_worker = self._name
        return output
