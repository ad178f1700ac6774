"""`Client`: what an application imports to talk to Baton by gRPC."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import grpc

from baton import errors
from baton.rpc import common_pb2, inference_pb2, inference_pb2_grpc
from baton.rpc.convert import logprobs_from_proto, sampling_to_proto
from baton.sampling import PositionLogprobs, SamplingParams
from baton.service import CHANNEL_OPTIONS

_ERRORS: dict[grpc.StatusCode, type[errors.BatonError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthorized,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
}

RequestClass = Literal["interactive", "standard", "batch"]
_CLASSES: dict[RequestClass, inference_pb2.RequestClass] = {
    "interactive": inference_pb2.REQUEST_CLASS_INTERACTIVE,
    "standard": inference_pb2.REQUEST_CLASS_STANDARD,
    "batch": inference_pb2.REQUEST_CLASS_BATCH,
}


@dataclass(frozen=True, slots=True)
class Cache:
    """How long a request's KV should be kept in the lower tiers of the workers, within the tenant's quota there."""

    ttl_s: float = 0.0
    """From its last use, a week at most; 0: no promise."""
    pin: bool = False
    """Until the tenant's cache is cleared."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is new since the part before. The last one has a finish reason, the usage and the timeline."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: str | None = None
    """stop or length."""
    usage: inference_pb2.Usage | None = None
    timeline: common_pb2.Timeline | None = None


class Client:
    """Thread-safe; use it as a context manager, or `close` it.

    Calls raise the tree of baton.errors: InvalidRequest, Unauthorized, ModelNotFound, Overloaded, Unavailable,
    DeadlineExceeded.
    """

    def __init__(self, address: str, api_key: str | None = None) -> None:
        """`address` is HOST:PORT of a router's gRPC port; the key is needed where the router knows tenants. Nothing is
        sent before the first call."""
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        cache_salt: str = "",
        cache: Cache | None = None,
        request_id: str = "",
        request_class: RequestClass | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Part]:
        """Streams the continuation of a prompt given as text or token ids. A more urgent class passes others where
        requests wait; None: the tenant's own. `cache` asks for the request's KV to be kept.

        Closing the iterator (leaving its `for` loop) cancels the request and frees its blocks.
        """
        request = inference_pb2.GenerateRequest(request_id=request_id, model=model, stop=stop, cache_salt=cache_salt)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        if sampling is not None:
            request.sampling.CopyFrom(sampling_to_proto(sampling))
        if cache is not None:
            request.cache.CopyFrom(inference_pb2.CacheOptions(ttl_s=cache.ttl_s, pin=cache.pin))
        if request_class is not None:
            request.request_class = _CLASSES[request_class]
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for response in call:
                yield _part(response)
        except grpc.RpcError as error:
            raise _failure(error) from None
        finally:
            call.cancel()

    def models(self) -> list[inference_pb2.Model]:
        try:
            return list(self._stub.ListModels(inference_pb2.ListModelsRequest(), metadata=self._metadata).models)
        except grpc.RpcError as error:
            raise _failure(error) from None

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _failure(error: grpc.RpcError) -> errors.BatonError:
    failure = _ERRORS.get(error.code(), errors.BatonError)(error.details())
    told = next((str(one.value) for one in error.trailing_metadata() or () if one.key == "retry-after"), "")
    if isinstance(failure, errors.Overloaded) and told.isdecimal():
        failure.retry_after_s = float(told)
    return failure


def _part(response: inference_pb2.GenerateResponse) -> Part:
    ended = response.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED
    return Part(
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(map(logprobs_from_proto, response.logprobs)),
        finish_reason=common_pb2.FinishReason.Name(response.finish_reason).removeprefix("FINISH_REASON_").lower()
        if ended
        else None,
        usage=response.usage if ended else None,
        timeline=response.timeline if ended else None,
    )
