"""Who asks by HTTP, and on what terms: what the headers say."""

from math import inf, isfinite

from starlette.requests import Request

from baton.errors import InvalidRequest
from router.admission.request_class import CLASSES, RequestClass
from router.frontend import Caller, Frontend

CLASS_HEADER = "x-baton-class"
DEADLINE_HEADER = "x-baton-deadline-s"


def read_caller(http: Request, frontend: Frontend) -> Caller:
    """Raises Unauthorized, or InvalidRequest if a header says what cannot be."""
    arrived_s = frontend.clock()
    tenant = frontend.tenants.authenticate(http.headers.get("authorization"))
    deadline = http.headers.get(DEADLINE_HEADER)
    deadline_s = None if deadline is None else arrived_s + _seconds(deadline)
    return Caller(tenant, arrived_s, deadline_s, _request_class(http.headers.get(CLASS_HEADER)))


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = inf
    if not (isfinite(seconds) and seconds > 0):
        raise InvalidRequest(f"The header {DEADLINE_HEADER} must hold a number of seconds above 0.", DEADLINE_HEADER)
    return seconds


def _request_class(given: str | None) -> RequestClass | None:
    if given is None:
        return None
    if (found := next((name for name in CLASSES if name == given.strip().lower()), None)) is None:
        raise InvalidRequest(f"The header {CLASS_HEADER} must be one of: {', '.join(CLASSES)}.", CLASS_HEADER)
    return found
