"""The stub decode worker, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from baton.rpc import common_pb2, worker_pb2, worker_pb2_grpc
from bench.stub_worker import StubWorker

TEXT = list(range(10, 20))


def submit(request_id: str, max_tokens: int) -> worker_pb2.ServeRequest:
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens)
    return worker_pb2.ServeRequest(submit=worker_pb2.Submit(request_id=request_id, prompt=[1, 2, 3], sampling=sampling))


async def serve(messages: asyncio.Queue[worker_pb2.ServeRequest | None]) -> AsyncIterator[worker_pb2.ServeRequest]:
    while (message := await messages.get()) is not None:
        yield message


async def outputs_of(*messages: worker_pb2.ServeRequest, until: int) -> list[worker_pb2.ServeResponse]:
    """What the worker says until so many sequences are finished."""
    outbox: asyncio.Queue[worker_pb2.ServeRequest | None] = asyncio.Queue()
    for message in messages:
        outbox.put_nowait(message)
    responses, finished = [], 0
    async with (
        StubWorker("stub", "m", 100, TEXT, step_s=0) as worker,
        grpc.aio.insecure_channel(worker.info.address) as channel,
    ):
        async for response in worker_pb2_grpc.DecodeWorkerStub(channel).Serve(serve(outbox)):
            responses.append(response)
            finished += sum(bool(output.finish_reason) for output in response.outputs)
            if finished == until:
                break
        outbox.put_nowait(None)
    return responses


def test_each_step_brings_each_sequence_the_texts_next_token() -> None:
    responses = asyncio.run(outputs_of(submit("a", 5), submit("b", 12), until=2))
    for request_id, tokens in (("a", 5), ("b", 12)):
        outputs = [output for response in responses for output in response.outputs if output.request_id == request_id]
        said = [token for output in outputs for token in output.token_ids]
        assert len(said) == len(outputs) == tokens
        assert said == [TEXT[(TEXT.index(said[0]) + step) % len(TEXT)] for step in range(tokens)]
        assert [bool(output.finish_reason) for output in outputs] == [False] * (tokens - 1) + [True]
        assert outputs[-1].timeline.decode_worker == "stub"


def test_a_cancelled_sequence_says_nothing_more() -> None:
    cancel = worker_pb2.ServeRequest(cancel=worker_pb2.Cancel(request_id="a"))
    responses = asyncio.run(outputs_of(submit("a", 10**6), submit("b", 3), cancel, submit("c", 50), until=2))
    later = responses[-40:]
    assert {output.request_id for response in later for output in response.outputs} == {"c"}


@pytest.mark.parametrize("step_s", [0.0, 0.02])
def test_it_is_no_faster_than_asked(step_s: float) -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        outbox: asyncio.Queue[worker_pb2.ServeRequest | None] = asyncio.Queue()
        outbox.put_nowait(submit("a", 4))
        async with (
            StubWorker("stub", "m", 100, TEXT, step_s) as worker,
            grpc.aio.insecure_channel(worker.info.address) as channel,
        ):
            arrivals = []
            async for response in worker_pb2_grpc.DecodeWorkerStub(channel).Serve(serve(outbox)):
                arrivals.append(loop.time())
                if response.outputs[0].finish_reason:
                    break
            outbox.put_nowait(None)
        return arrivals[-1] - arrivals[0]

    assert asyncio.run(main()) > 2.5 * step_s
