"""The OpenAI-compatible HTTP API, and what operators look at."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from baton.errors import BatonError, InvalidRequest, Unavailable
from router.catalog import ServedModel
from router.frontend import Frontend
from router.http.cache_routes import add_cache_routes
from router.http.caller import read_caller
from router.http.chat import CHAT
from router.http.completions import COMPLETIONS
from router.http.door import CLIENT_LEFT, Door
from router.http.errors import error_response, json_response, plain_error
from router.http.generation import generate
from router.http.openai_requests import ChatCompletionRequest, CompletionRequest
from router.http.openai_responses import ChatCompletion, Completion, ErrorResponse, ModelCard, ModelList
from router.http.operator import add_operator_routes

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What is wrong with the request, or that there is no room for it"},
    "5XX": {"model": ErrorResponse, "description": "Why it could not be served"},
}


def make_http_app(frontend: Frontend, registry: CollectorRegistry) -> ASGIApp:
    app = FastAPI(title="Baton", version="1", redoc_url=None)
    app.add_exception_handler(BatonError, _baton_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _bad_parameter)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _failed)
    _add_generation_routes(app, frontend)
    _add_model_routes(app, frontend)
    add_operator_routes(app, frontend, registry)
    add_cache_routes(app, frontend)
    _describe_requests(app)
    return Door(app, frontend.metrics, [route.path for route in app.routes if isinstance(route, Route)])


def _add_generation_routes(app: FastAPI, frontend: Frontend) -> None:
    @app.post("/v1/completions", responses={200: {"model": Completion}, **_ERRORS}, **_body("CompletionRequest"))
    async def completions(request: Request) -> Response:
        return await generate(request, frontend, COMPLETIONS)

    @app.post(
        "/v1/chat/completions", responses={200: {"model": ChatCompletion}, **_ERRORS}, **_body("ChatCompletionRequest")
    )
    async def chat_completions(request: Request) -> Response:
        return await generate(request, frontend, CHAT)


def _add_model_routes(app: FastAPI, frontend: Frontend) -> None:
    started_s = int(frontend.wall_clock())

    def card(served: ServedModel) -> ModelCard:
        try:
            context_length = served.facts().context_length
        except Unavailable:
            context_length = None
        return {
            "id": served.name,
            "object": "model",
            "created": started_s,
            "owned_by": "baton",
            "max_model_len": context_length,
            "aliases": list(served.aliases),
        }

    @app.get("/v1/models", responses={200: {"model": ModelList}})
    async def list_models(request: Request) -> Response:
        """Those that the caller may use."""
        models = frontend.catalog.open_to(read_caller(request, frontend).tenant)
        return json_response({"object": "list", "data": [card(served) for served in models]})

    @app.get("/v1/models/{name:path}", responses={200: {"model": ModelCard}, **_ERRORS})
    async def retrieve_model(request: Request, name: str) -> Response:
        return json_response(card(frontend.catalog.find(name, read_caller(request, frontend).tenant)))


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


async def _bad_parameter(request: Request, error: Exception) -> Response:
    """Of the few routes whose parameters FastAPI checks."""
    del request
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return error_response(InvalidRequest(f"{name}: {first['msg']}.", name))


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
