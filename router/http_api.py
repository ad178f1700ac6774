"""The OpenAI-compatible HTTP API, and what operators look at."""

from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from baton.errors import BatonError, Unavailable
from router.answer import Answer, Dialect, collect
from router.chat import CHAT
from router.completions import COMPLETIONS
from router.frontend import Frontend
from router.generation import Generation
from router.http_door import CLIENT_LEFT, Door
from router.http_errors import error_body, error_response, json_response, plain_error
from router.http_io import EventStream, SendEvent, read_body, while_connected
from router.openai_requests import ChatCompletionRequest, CompletionRequest, parse_request
from router.openai_responses import ChatCompletion, Completion, ErrorResponse, ModelCard, ModelList
from router.sequence import Delta
from router.worker_status import worker_statuses

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request, or that there is no room for it"},
    "5XX": {"model": ErrorResponse, "description": "Why it could not be served"},
}


def make_http_app(frontend: Frontend, registry: CollectorRegistry) -> ASGIApp:
    app = FastAPI(title="Baton", version="1", redoc_url=None)
    app.add_exception_handler(BatonError, _baton_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _failed)
    _add_generation_routes(app, frontend)
    _add_model_routes(app, frontend)
    _add_operator_routes(app, frontend, registry)
    _describe_requests(app)
    return Door(app, frontend.metrics, [route.path for route in app.routes if isinstance(route, Route)])


def _add_generation_routes(app: FastAPI, frontend: Frontend) -> None:
    @app.post("/v1/completions", responses={200: {"model": Completion}, **_ERRORS}, **_body("CompletionRequest"))
    async def completions(request: Request) -> Response:
        return await _generate(request, frontend, COMPLETIONS)

    @app.post(
        "/v1/chat/completions", responses={200: {"model": ChatCompletion}, **_ERRORS}, **_body("ChatCompletionRequest")
    )
    async def chat_completions(request: Request) -> Response:
        return await _generate(request, frontend, CHAT)


def _add_model_routes(app: FastAPI, frontend: Frontend) -> None:
    started_s = int(frontend.wall_clock())

    def card() -> ModelCard:
        try:
            context_length = frontend.generator.facts().context_length
        except Unavailable:
            context_length = None
        name = frontend.generator.model
        return {
            "id": name,
            "object": "model",
            "created": started_s,
            "owned_by": "baton",
            "max_model_len": context_length,
        }

    @app.get("/v1/models", responses={200: {"model": ModelList}})
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}", responses={200: {"model": ModelCard}, **_ERRORS})
    async def retrieve_model(name: str) -> Response:
        frontend.generator.check_model(name)
        return json_response(card())


def _add_operator_routes(app: FastAPI, frontend: Frontend, registry: CollectorRegistry) -> None:
    pool = frontend.generator.pool

    @app.get("/health")
    async def health() -> Response:
        """200 while a request could be served, else 503 and why not."""
        if frontend.admission.is_closed:
            return json_response({"status": "unavailable", "reason": "the router is shutting down"}, 503)
        if not pool.is_ready:
            reason = f"no decode worker of {frontend.generator.model!r} is ready; known workers: {len(pool.members)}"
            return json_response({"status": "unavailable", "reason": reason}, 503)
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/v1/workers")
    async def workers() -> Response:
        """Every worker of the cluster, asked now."""
        return json_response({"object": "list", "data": await worker_statuses(pool.members)})


async def _generate(http: Request, frontend: Frontend, dialect: Dialect[Any]) -> Response:
    """The answer, or a stream of it that begins with the first token: what fails before has a status."""
    arrived_s = frontend.clock()
    with ExitStack() as held:
        place = held.enter_context(frontend.admission.admit())
        request = parse_request(dialect.request, await read_body(http, frontend.settings.body_bytes_max))
        if request.model is not None:
            frontend.generator.check_model(request.model)
        place.widen(dialect.count(request))
        request_id = http.state.request_id

        async def begin() -> tuple[Generation, tuple[int, Delta] | None]:
            sequences = await dialect.sequences(request, frontend)
            generation = frontend.generator.start(request_id, sequences, arrived_s)
            held.callback(generation.close)
            return generation, await generation.next() if request.stream else None

        generation, first = await while_connected(http.receive, begin())
        answer = dialect.answer(request, generation, frontend)
        if first is None:
            return json_response(answer.whole(await while_connected(http.receive, collect(generation))))

        async def write(send_event: SendEvent) -> None:
            await _write_events(answer, generation, first, send_event)

        return EventStream(write, held.pop_all().close, frontend.settings.request_timeout_s)


async def _write_events(
    answer: Answer[Any], generation: Generation, first: tuple[int, Delta], send_event: SendEvent
) -> None:
    """All chunks and the end mark; a stream that fails ends with an error instead of the mark."""
    try:
        for chunk in answer.opening():
            await send_event(chunk)
        item: tuple[int, Delta] | None = first
        while item is not None:
            if (chunk_or_none := answer.chunk(*item)) is not None:
                await send_event(chunk_or_none)
            item = await generation.next()
        for chunk in answer.closing():
            await send_event(chunk)
    except BatonError as error:
        await send_event(error_body(error))
    else:
        await send_event("[DONE]")


async def _baton_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, BatonError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path[:200]
    match error.status_code:
        case 404:
            return plain_error(404, f"There is no {method} {path} here; /docs lists what there is.", "unknown_url")
        case 405:
            return plain_error(405, f"{path} does not take {method}.", "method_not_allowed", error.headers)
    return plain_error(error.status_code, str(error.detail), None, error.headers)


async def _client_left(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=CLIENT_LEFT)


async def _failed(request: Request, error: Exception) -> Response:
    """A bug of ours, which the door logs."""
    del request, error
    return plain_error(500, "The server failed to handle this request.", "internal_error")


def _body(name: str) -> dict[str, Any]:
    """A route's description for a body that it parses itself."""
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}}


def _describe_requests(app: FastAPI) -> None:
    """Adds the requests' schemas, which FastAPI does not see, to what it describes."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        kinds: list[tuple[type[BaseModel], JsonSchemaMode]] = [
            (CompletionRequest, "validation"),
            (ChatCompletionRequest, "validation"),
        ]
        _, definitions = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
        description = describe()
        description["components"]["schemas"] |= definitions["$defs"]
        return description

    app.openapi = openapi  # type: ignore[method-assign]
