"""What operators look at by HTTP: health, metrics, workers, and why a request was placed where it was.

Health and metrics are for probes and scrapers, which have no key. What names workers or requests takes the key of a
tenant where there are tenants, and of a request's placement a tenant sees only its own.
"""

from typing import Any

from fastapi import FastAPI, Request
from google.protobuf.json_format import MessageToDict
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import Response

from baton.ids import RequestId
from baton.rpc import inference_pb2
from router.frontend import FORGOTTEN, Frontend
from router.http.errors import json_response, plain_error
from router.http.openai_responses import ErrorResponse
from router.worker_status import worker_statuses


def add_operator_routes(app: FastAPI, frontend: Frontend, registry: CollectorRegistry) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while a request could be served, else 503 and why not."""
        reason = frontend.unready()
        body = {"status": "ok"} if reason is None else {"status": "unavailable", "reason": reason}
        return json_response(body | _detail(frontend), 200 if reason is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/v1/workers")
    async def workers(request: Request) -> Response:
        """Every worker of the cluster, asked now."""
        frontend.tenants.authenticate(request.headers.get("authorization"))
        return json_response({"object": "list", "data": await worker_statuses(frontend.cluster.members())})

    @app.get("/v1/decisions/{request_id}", responses={404: {"model": ErrorResponse}})
    async def decision(request: Request, request_id: str, local: bool = False) -> Response:
        """Why a request was placed where it was, and what became of it; `local`: as this router alone knows it."""
        authorization = request.headers.get("authorization")
        found = await frontend.find_decision(RequestId(request_id), authorization, this_router_only=local)
        return plain_error(404, FORGOTTEN, "decision_not_found") if found is None else json_response(as_json(found))


def as_json(decision: inference_pb2.Decision) -> dict[str, Any]:
    """By the names of its fields in inference.proto; all of them, but for `actual` before there is anything to tell."""
    return MessageToDict(decision, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _detail(frontend: Frontend) -> dict[str, Any]:
    models = {served.name: {"ready": served.is_ready} for served in frontend.catalog}
    queue = {"waiting": frontend.admission.waiting, "in_flight": frontend.admission.in_flight}
    return {"models": models, "queue": queue, **frontend.cluster.health()}
