"""The Python client before a scripted router, over real gRPC."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from baton.client import Cache, Client
from baton.errors import InvalidRequest, Overloaded
from baton.rpc import common_pb2, inference_pb2, inference_pb2_grpc


class ScriptedRouter(inference_pb2_grpc.InferenceServicer):
    """Answers `hi` in two parts, or refuses."""

    def __init__(self, refusal: grpc.StatusCode | None = None) -> None:
        self.refusal, self.requests = refusal, list[inference_pb2.GenerateRequest]()

    def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        if self.refusal is not None:
            context.set_trailing_metadata((("retry-after", "7"),))
            context.abort(self.refusal, "No.")
        yield inference_pb2.GenerateResponse(text="h", token_ids=[1])
        usage = inference_pb2.Usage(prompt_tokens=3, completion_tokens=2)
        yield inference_pb2.GenerateResponse(
            text="i", token_ids=[2], finish_reason=common_pb2.FINISH_REASON_STOP, usage=usage
        )


@contextmanager
def connected(router: ScriptedRouter) -> Iterator[Client]:
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        inference_pb2_grpc.add_InferenceServicer_to_server(router, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with Client(f"127.0.0.1:{port}") as client:
                yield client
        finally:
            server.stop(None).wait()


def test_an_answer_comes_in_parts() -> None:
    router = ScriptedRouter()
    with connected(router) as client:
        parts = list(client.generate("m", [5, 6, 7], cache_salt="s", stop=["x"]))
    assert ("".join(part.text for part in parts), [part.token_ids for part in parts]) == ("hi", [(1,), (2,)])
    assert [part.finish_reason for part in parts] == [None, "stop"]
    assert parts[0].usage is None and parts[1].usage is not None and parts[1].usage.prompt_tokens == 3
    (request,) = router.requests
    assert (list(request.token_ids.ids), request.cache_salt, list(request.stop)) == ([5, 6, 7], "s", ["x"])


@pytest.mark.parametrize(
    ("cache", "told"),
    [(Cache(ttl_s=90.5), (90.5, False)), (Cache(pin=True), (0.0, True)), (Cache(60, True), (60.0, True))],
)
def test_how_long_kv_is_to_be_kept_is_told(cache: Cache, told: tuple[float, bool]) -> None:
    router = ScriptedRouter()
    with connected(router) as client:
        list(client.generate("m", "a", cache=cache))
    (request,) = router.requests
    assert (request.cache.ttl_s, request.cache.pin) == told


def test_nothing_is_said_of_the_cache_unless_it_is_asked_for() -> None:
    router = ScriptedRouter()
    with connected(router) as client:
        list(client.generate("m", "a"))
    assert not router.requests[0].HasField("cache")


def test_a_refusal_is_of_the_tree_of_errors() -> None:
    with connected(ScriptedRouter(grpc.StatusCode.INVALID_ARGUMENT)) as client, pytest.raises(InvalidRequest):
        list(client.generate("m", "a", cache=Cache(ttl_s=-1)))
    busy = ScriptedRouter(grpc.StatusCode.RESOURCE_EXHAUSTED)
    with connected(busy) as client, pytest.raises(Overloaded, match=r"No\.") as caught:
        list(client.generate("m", "a"))
    assert caught.value.retry_after_s == 7
