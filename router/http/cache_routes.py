"""What operators see of the cache by HTTP, and how they clear it.

A prefix's name is a hash that somebody who guesses the prompt can compute, too: so a tenant is shown how full the
tiers are and what they do, but not which prefixes are hot.
"""

from typing import Annotated

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import Response

from baton.errors import InvalidRequest
from router.admission.tenants import Tenant
from router.cache_status import TOP_PREFIXES_MAX, cache_status, clear_caches
from router.frontend import Frontend
from router.http.errors import json_response
from router.http.io import read_body, while_connected

TOP_PREFIXES_DEFAULT = 10
BODY_BYTES_MAX = 4096
TENANT_CHARACTERS_MAX = 63


class ClearRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    tenant: str | None = None
    """None: everybody's."""


def add_cache_routes(app: FastAPI, frontend: Frontend) -> None:
    @app.get("/v1/cache")
    async def cache(
        request: Request, top: Annotated[int, Query(ge=0, le=TOP_PREFIXES_MAX)] = TOP_PREFIXES_DEFAULT
    ) -> Response:
        """Every worker's tiers, asked now, and the prefixes that are reused most."""
        tenant = frontend.tenants.authenticate(request.headers.get("authorization"))
        return json_response(await cache_status(frontend.cluster.members(), top if tenant.operator else 0))

    @app.post("/v1/cache/clear")
    async def clear(request: Request) -> Response:
        """Has every worker forget a tenant's blocks, or all."""
        caller = frontend.tenants.authenticate(request.headers.get("authorization"))
        asked = _parse(await read_body(request, BODY_BYTES_MAX))
        check_may_clear(caller, asked)
        cleared = clear_caches(frontend.cluster.members(), asked.tenant or "")
        return json_response(await while_connected(request.receive, cleared))


def check_may_clear(caller: Tenant, asked: ClearRequest) -> None:
    """Raises InvalidRequest if it is not the caller's to clear."""
    if asked.tenant is not None and not 0 < len(asked.tenant) <= TENANT_CHARACTERS_MAX:
        raise InvalidRequest(
            f"tenant must be a tenant's name, of {TENANT_CHARACTERS_MAX} characters at most.", "tenant"
        )
    if not caller.operator and asked.tenant != caller.name:
        raise InvalidRequest(
            f"This API key may clear the cache of its own tenant alone: name it, {caller.name}, as `tenant`.", "tenant"
        )


def _parse(body: bytes) -> ClearRequest:
    try:
        return ClearRequest.model_validate_json(body or b"{}")
    except ValidationError:
        raise InvalidRequest('The body must be {"tenant": NAME}, or {} for everybody\'s cache.', "tenant") from None
