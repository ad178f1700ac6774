"""baton.v1.Inference: the gRPC door."""

from contextlib import ExitStack
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from baton.errors import BatonError, InvalidRequest, Unavailable
from baton.ids import RequestId, new_request_id
from baton.rpc import common_pb2, inference_pb2
from baton.rpc.convert import logprobs_to_proto, sampling_from_proto
from baton.rpc.status_codes import status_code
from router.frontend import Frontend
from router.generation import Generation
from router.http_door import SANE_ID
from router.sequence import Delta, SequenceRequest
from router.stop_strings import check_stops

SERVICE = "baton.v1.Inference"
CACHE_SALT_CHARACTERS_MAX = 256
_FINISH_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
}
Context = grpc.aio.ServicerContext[bytes, inference_pb2.GenerateResponse]


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
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def generate(self, raw: bytes, context: Context) -> None:
        """The caller's deadline or cancellation cancels this, and with it the request on its worker."""
        code = "CANCELLED"
        try:
            await self._generate(_parse(raw), context)
            code = "OK"
        except BatonError as error:
            code = status_code(error).name
            await context.abort(status_code(error), str(error))
        finally:
            self._frontend.metrics.answered("grpc", "Generate", code)

    async def list_models(self, raw: bytes, context: Context) -> inference_pb2.ListModelsResponse:
        del raw, context
        generator = self._frontend.generator
        try:
            context_length = generator.facts().context_length
        except Unavailable:
            context_length = 0
        model = inference_pb2.Model(name=generator.model, context_length=context_length, ready=generator.pool.is_ready)
        return inference_pb2.ListModelsResponse(models=[model])

    async def _generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        arrived_s = self._frontend.clock()
        generator = self._frontend.generator
        with ExitStack() as held:
            held.enter_context(self._frontend.admission.admit())
            request_id = _request_id(request)
            if request.model:
                generator.check_model(request.model)
            template = _template(request)
            prompt = await self._prompt(request)
            generation = generator.start(request_id, self._frontend.sequences([prompt], template), arrived_s)
            held.callback(generation.close)
            while (item := await generation.next()) is not None:
                await context.write(_response(generation, item[1]))

    async def _prompt(self, request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        match request.WhichOneof("prompt"):
            case "text":
                return await self._frontend.prompts.encode(request.text)
            case "token_ids":
                return tuple(request.token_ids.ids)
        raise InvalidRequest("Either text or token_ids must be given as the prompt.", "prompt")


def _parse(raw: bytes) -> inference_pb2.GenerateRequest:
    try:
        return inference_pb2.GenerateRequest.FromString(raw)
    except DecodeError:
        raise InvalidRequest(
            "The message is not a baton.v1.GenerateRequest: it cannot be parsed, or a string in it is not UTF-8."
        ) from None


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
