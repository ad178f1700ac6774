"""baton.v1.Inference: the gRPC door."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from baton.errors import BatonError, InvalidRequest, Unavailable
from baton.ids import RequestId, new_request_id
from baton.rpc import common_pb2, inference_pb2
from baton.rpc.convert import logprobs_to_proto, sampling_from_proto
from baton.rpc.status_codes import status_code
from router.admission.request_class import RequestClass
from router.catalog import ServedModel
from router.frontend import FORGOTTEN, Caller, Frontend, Order
from router.generation import Generation
from router.http.errors import retry_after_s
from router.request_id import SANE_ID
from router.retention import Retention
from router.sequence import Delta, SequenceRequest
from router.text.stop_strings import check_stops

SERVICE = "baton.v1.Inference"
CACHE_SALT_CHARACTERS_MAX = 256
_FINISH_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
}
_CLASSES: Mapping[int, RequestClass | None] = {
    inference_pb2.REQUEST_CLASS_UNSPECIFIED: None,
    inference_pb2.REQUEST_CLASS_INTERACTIVE: "interactive",
    inference_pb2.REQUEST_CLASS_STANDARD: "standard",
    inference_pb2.REQUEST_CLASS_BATCH: "batch",
}
Context = grpc.aio.ServicerContext[bytes, Any]
Message = TypeVar("Message", inference_pb2.GenerateRequest, inference_pb2.GetDecisionRequest)


class InferenceService:
    """Requests arrive as bytes and are parsed here, so that garbage is the caller's error and not ours."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def register(self, server: grpc.aio.Server) -> None:
        handlers: dict[str, grpc.RpcMethodHandler[bytes, Any]] = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.generate, response_serializer=inference_pb2.GenerateResponse.SerializeToString
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                self.list_models, response_serializer=inference_pb2.ListModelsResponse.SerializeToString
            ),
            "GetDecision": grpc.unary_unary_rpc_method_handler(
                self.get_decision, response_serializer=inference_pb2.Decision.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def generate(self, raw: bytes, context: Context) -> None:
        """The caller's deadline or cancellation cancels this, and with it the request on its worker."""
        code, model = "CANCELLED", ""
        try:
            caller = self._caller(context)
            request = _parse(raw, inference_pb2.GenerateRequest)
            order = Order.of(self._frontend, caller, request.model, _request_class(request))
            model = order.served.name
            await self._generate(request, order, context)
            code = "OK"
        except BatonError as error:
            code = status_code(error).name
            await _abort(context, error)
        finally:
            self._frontend.metrics.answered(model, "grpc", "Generate", code)

    async def list_models(self, raw: bytes, context: Context) -> inference_pb2.ListModelsResponse:
        """Those that the caller may use."""
        del raw
        try:
            models = self._frontend.catalog.open_to(self._caller(context).tenant)
        except BatonError as error:
            await _abort(context, error)
        return inference_pb2.ListModelsResponse(models=map(_model, models))

    async def get_decision(self, raw: bytes, context: Context) -> inference_pb2.Decision:
        try:
            request = _parse(raw, inference_pb2.GetDecisionRequest)
            found = await self._frontend.find_decision(
                RequestId(request.request_id), _authorization(context), this_router_only=request.this_router_only
            )
        except BatonError as error:
            await _abort(context, error)
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, FORGOTTEN)
        return found

    def _caller(self, context: Context) -> Caller:
        """Raises Unauthorized."""
        arrived_s, remaining_s = self._frontend.clock(), context.time_remaining()
        deadline_s = None if remaining_s is None else arrived_s + remaining_s
        return Caller(self._frontend.tenants.authenticate(_authorization(context)), arrived_s, deadline_s)

    async def _generate(self, request: inference_pb2.GenerateRequest, order: Order, context: Context) -> None:
        if order.served.upstream is not None and order.served.upstream.use == "always":
            raise Unavailable(
                "This model is served by its upstream alone, which takes requests by HTTP; send it there."
            )
        async with AsyncExitStack() as held:
            held.enter_context(self._frontend.admission.enter())
            request_id = _request_id(request)
            sequences = order.sequences([await _prompt(request, order.served)], _template(request))
            generation = await order.start(request_id, sequences, held)
            while (item := await generation.next()) is not None:
                await context.write(_response(generation, item[1]))


async def _abort(context: Context, error: BatonError) -> NoReturn:
    seconds = retry_after_s(error)
    metadata = () if seconds is None else (("retry-after", str(seconds)),)
    await context.abort(status_code(error), str(error), metadata)


def _authorization(context: Context) -> str | None:
    found = (value for key, value in context.invocation_metadata() or () if key == "authorization")
    value = next(found, None)
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _model(served: ServedModel) -> inference_pb2.Model:
    try:
        context_length, is_ready = served.facts().context_length, True
    except Unavailable:
        context_length, is_ready = 0, False
    return inference_pb2.Model(name=served.name, context_length=context_length, ready=is_ready, aliases=served.aliases)


async def _prompt(request: inference_pb2.GenerateRequest, served: ServedModel) -> tuple[int, ...]:
    match request.WhichOneof("prompt"):
        case "text":
            return await served.prompts.encode(request.text)
        case "token_ids":
            return tuple(request.token_ids.ids)
    raise InvalidRequest("Either text or token_ids must be given as the prompt.", "prompt")


def _parse(raw: bytes, kind: type[Message]) -> Message:
    try:
        return kind.FromString(raw)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        raise InvalidRequest(
            f"The message is no {name}: it cannot be parsed, or a string in it is not UTF-8."
        ) from None


def _request_class(request: inference_pb2.GenerateRequest) -> RequestClass | None:
    """None: the tenant's own."""
    if request.request_class not in _CLASSES:
        raise InvalidRequest("request_class must be one of those that inference.proto names.", "request_class")
    return _CLASSES[request.request_class]


def _request_id(request: inference_pb2.GenerateRequest) -> RequestId:
    if not request.request_id:
        return new_request_id()
    if not SANE_ID.fullmatch(request.request_id):
        raise InvalidRequest("request_id may have 128 letters, digits and signs of . _ : - at most.", "request_id")
    return RequestId(request.request_id)


def _template(request: inference_pb2.GenerateRequest) -> SequenceRequest:
    if len(request.cache_salt) > CACHE_SALT_CHARACTERS_MAX:
        raise InvalidRequest(f"cache_salt may have {CACHE_SALT_CHARACTERS_MAX} characters at most.", "cache_salt")
    return SequenceRequest(
        prompt=(),
        sampling=sampling_from_proto(request.sampling),
        stop=check_stops(request.stop),
        cache_salt=request.cache_salt,
        retention=Retention(request.cache.ttl_s, request.cache.pin),
    )


def _response(generation: Generation, delta: Delta) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(
        request_id=generation.request_id,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=map(logprobs_to_proto, delta.logprobs),
        prompt_logprobs=map(logprobs_to_proto, delta.prompt_logprobs),
        finish_reason=_FINISH_REASONS[delta.finish_reason],
        timeline=delta.timeline,
    )
    if delta.finish_reason is not None:
        usage = generation.usage
        response.usage.CopyFrom(
            inference_pb2.Usage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
            )
        )
    return response
