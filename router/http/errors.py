"""Errors as OpenAI writes them, with an HTTP status: the same for everything that can go wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from starlette.responses import Response

from baton import errors
from router.http.openai_responses import ErrorResponse
from router.upstream import UpstreamFailed


class BodyTooLarge(errors.InvalidRequest):
    pass


UNAVAILABLE_RETRY_S = 1.0
"""When to ask again where nobody can tell: a heartbeat brings news."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Kind:
    status: int
    type: str
    code: str | None = None


_KINDS: dict[type[errors.BatonError], Kind] = {
    errors.ModelNotFound: Kind(404, "invalid_request_error", "model_not_found"),
    BodyTooLarge: Kind(413, "invalid_request_error", "body_too_large"),
    errors.InvalidRequest: Kind(400, "invalid_request_error"),
    errors.Unauthorized: Kind(401, "invalid_request_error", "invalid_api_key"),
    errors.RateLimited: Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.Overloaded: Kind(429, "rate_limit_error", "overloaded"),
    UpstreamFailed: Kind(502, "service_unavailable_error", "upstream_failed"),
    errors.Unavailable: Kind(503, "service_unavailable_error", "unavailable"),
    errors.ClusterError: Kind(503, "service_unavailable_error", "unavailable"),
    errors.DeadlineExceeded: Kind(504, "timeout_error", "deadline_exceeded"),
    errors.BatonError: Kind(500, "server_error", "internal_error"),
}


def kind_of(error: errors.BatonError) -> Kind:
    """That of the error's own class, else of its nearest ancestor that has one."""
    return next(_KINDS[ancestor] for ancestor in type(error).__mro__ if ancestor in _KINDS)


def error_body(error: errors.BatonError) -> ErrorResponse:
    kind = kind_of(error)
    param = error.param if isinstance(error, errors.InvalidRequest) else None
    return {"error": {"message": str(error), "type": kind.type, "param": param, "code": kind.code}}


def error_response(error: errors.BatonError) -> Response:
    headers = {}
    if (seconds := retry_after_s(error)) is not None:
        headers["retry-after"] = str(seconds)
    if isinstance(error, errors.Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error), kind_of(error).status, headers)


def retry_after_s(error: errors.BatonError) -> int | None:
    """Whole seconds, at least one, until the same request may be served; None where time alone changes nothing."""
    if isinstance(error, errors.Overloaded):
        return max(1, ceil(error.retry_after_s))
    return ceil(UNAVAILABLE_RETRY_S) if isinstance(error, (errors.Unavailable, errors.ClusterError)) else None


def plain_error(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """For what is no error of the house: an unknown route, a wrong method."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body: ErrorResponse = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return json_response(body, status, headers)


def json_text(body: object) -> str:
    return _ENCODER.encode(body)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_text(body), status, headers, "application/json")
