"""A decode worker that says what it is told to, over real gRPC, and remembers what it was asked."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc.aio

from baton.cluster.worker_info import State, WorkerInfo
from baton.ids import WorkerId
from baton.rpc import common_pb2, worker_pb2, worker_pb2_grpc

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
SPOKEN = range(66, 130)
"""Tokens of the text model (tests/router/text_model.py): the letters from a on, and bytes of longer characters."""
Script = Callable[[worker_pb2.Submit], AsyncIterator[worker_pb2.TokenOutput]]


def output(*token_ids: int, finish: int = 0, **fields: Any) -> worker_pb2.TokenOutput:
    return worker_pb2.TokenOutput(token_ids=token_ids, finish_reason=common_pb2.FinishReason.Name(finish), **fields)


def failure(kind: int, error: str = "It went wrong.") -> worker_pb2.TokenOutput:
    return output(finish=common_pb2.FINISH_REASON_ERROR, error=error, error_kind=kind)


def says(outputs: Iterable[worker_pb2.TokenOutput]) -> Script:
    """The same outputs for every request."""
    prepared = list(outputs)

    async def script(submit: worker_pb2.Submit) -> AsyncIterator[worker_pb2.TokenOutput]:
        del submit
        for each in prepared:
            yield each

    return script


def token_at(submit: worker_pb2.Submit, position: int) -> int:
    """What a model of this prompt and seed says there, on whatever worker."""
    drawn = zlib.crc32(f"{list(submit.prompt)} {submit.sampling.seed} {position}".encode())
    return SPOKEN[drawn % len(SPOKEN)]


async def speaks(submit: worker_pb2.Submit) -> AsyncIterator[worker_pb2.TokenOutput]:
    """One token at a time up to `max_tokens`, going on after `submit.generated`; with logprobs where asked for."""
    begins, ends = len(submit.generated), submit.sampling.max_tokens
    if begins >= ends or list(submit.generated) != [token_at(submit, position) for position in range(begins)]:
        yield failure(worker_pb2.ERROR_KIND_INVALID_REQUEST, "These are not the tokens that I would have generated.")
        return
    for position in range(begins, ends):
        token, is_last = token_at(submit, position), position == ends - 1
        answer = output(token, finish=LENGTH if is_last else 0, cached_tokens=2 + begins)
        if submit.sampling.HasField("logprobs"):
            answer.logprobs.add().tokens.add(token_id=token, logprob=-position)
        if position == begins and submit.sampling.HasField("prompt_logprobs"):
            for prompt_token in submit.prompt:
                answer.prompt_logprobs.add().tokens.add(token_id=prompt_token, logprob=-1)
        if is_last:
            answer.timeline.SetInParent()
        yield answer


async def is_silent(submit: worker_pb2.Submit) -> AsyncIterator[worker_pb2.TokenOutput]:
    """Takes requests and never answers."""
    del submit
    await asyncio.Event().wait()
    yield output()


class FakeDecodeWorker(worker_pb2_grpc.DecodeWorkerServicer, worker_pb2_grpc.WorkerServicer):
    """An async context manager; `stop` kills it: its streams break."""

    def __init__(self, script: Script, name: str = "decode-1", *, context_length: int = 1000, model: str = "m") -> None:
        self.script, self.name, self.context_length, self.model = script, name, context_length, model
        self.state: State = "ready"
        self.submits: list[worker_pb2.Submit] = []
        self.cancels: list[str] = []
        self.outputs = 0
        self.said_all: set[str] = set()
        """Requests whose script came to its end, whether or not with a finish reason."""
        self.epoch = "1"
        self.streams = 0
        self.cache_status: worker_pb2.CacheStatus | None = worker_pb2.CacheStatus(worker_id=name)
        """None: it does not answer that, as older workers do not."""
        self.top_prefixes_asked: list[int] = []
        self.cleared: list[str] = []
        """Tenants whose blocks it was told to forget."""
        self._news = asyncio.Condition()
        self._writing = asyncio.Lock()
        self._port = 0

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=WorkerId(self.name),
            role="decode",
            state=self.state,
            address=f"127.0.0.1:{self._port}",
            model=self.model,
            fingerprint=f"of {self.model}",
            context_length=self.context_length,
            vocabulary_size=400,
            block_tokens=16,
            kv_dtype="float32",
            kv_blocks_total=1000,
            epoch=self.epoch,
        )

    async def start(self) -> None:
        """On the port of its last life, if it had one."""
        self._server = grpc.aio.server()
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, self._server)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)
        await asyncio.sleep(0)

    async def __aenter__(self) -> "FakeDecodeWorker":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def settled(self) -> None:
        """Returns when every request has been answered as far as its script goes, or cancelled."""
        await self.until(
            lambda worker: all(s.request_id in worker.said_all.union(worker.cancels) for s in worker.submits)
        )

    async def until(self, holds: Callable[["FakeDecodeWorker"], bool], timeout_s: float = 30) -> None:
        async with asyncio.timeout(timeout_s), self._news:
            await self._news.wait_for(lambda: holds(self))

    async def Serve(self, request_iterator: AsyncIterator[worker_pb2.ServeRequest], context: Any) -> None:  # noqa: N802
        answering: dict[str, asyncio.Task[None]] = {}
        self.streams += 1
        try:
            async for message in request_iterator:
                if message.WhichOneof("message") == "submit":
                    submit = message.submit
                    answering[submit.request_id] = asyncio.create_task(self._answer(submit, context))
                    self.submits.append(submit)
                else:
                    answering[message.cancel.request_id].cancel()
                    self.cancels.append(message.cancel.request_id)
                async with self._news:
                    self._news.notify_all()
        finally:
            for task in answering.values():
                task.cancel()
            await asyncio.gather(*answering.values(), return_exceptions=True)

    async def _answer(self, submit: worker_pb2.Submit, context: Any) -> None:
        async for each in self.script(submit):
            named = worker_pb2.TokenOutput()
            named.CopyFrom(each)
            named.request_id = submit.request_id
            async with self._writing:
                await context.write(worker_pb2.ServeResponse(outputs=[named]))
            self.outputs += 1
            async with self._news:
                self._news.notify_all()
        self.said_all.add(submit.request_id)
        async with self._news:
            self._news.notify_all()

    async def GetStatus(self, request: object, context: object) -> worker_pb2.WorkerStatus:  # noqa: N802
        del request, context
        return worker_pb2.WorkerStatus(
            worker_id=self.name, role="decode", model=self.model, state=worker_pb2.WORKER_STATE_READY, kv_blocks_used=7
        )

    async def GetCacheStatus(  # noqa: N802
        self, request: worker_pb2.GetCacheStatusRequest, context: Any
    ) -> worker_pb2.CacheStatus:
        self.top_prefixes_asked.append(request.top_prefixes)
        if self.cache_status is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        assert self.cache_status is not None
        return self.cache_status

    async def ClearCache(  # noqa: N802
        self, request: worker_pb2.ClearCacheRequest, context: object
    ) -> worker_pb2.ClearCacheResponse:
        """Of every tenant there are 10 blocks."""
        del context
        self.cleared.append(request.tenant)
        return worker_pb2.ClearCacheResponse(blocks=10, bytes=10 * 2**20)

    async def GetCacheSnapshot(  # noqa: N802
        self, request: object, context: object
    ) -> AsyncIterator[worker_pb2.CacheSnapshot]:
        """An empty cache."""
        del request, context
        yield worker_pb2.CacheSnapshot(epoch=self.epoch)
