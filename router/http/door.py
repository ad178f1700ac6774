"""What every HTTP request passes: it gets an id, is counted, and no failure of ours escapes unshaped."""

import logging
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.metrics import RouterMetrics
from router.request_id import request_id_from

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's status for a client that did not wait; it goes to the metrics alone."""


class Door:
    """ASGI middleware, outermost. The id is `scope["state"]["request_id"]`, and goes back in a header; who serves the
    request sets `scope["state"]["model"]` to the name of the model that it concerns, if any. The middlewares, this one
    included, look at how a response starts and ends; what lies between may go by `scope["state"]["send_part"]` instead,
    which is the server's own.

    `endpoints` are the paths that have a metric of their own.
    """

    def __init__(self, app: ASGIApp, metrics: RouterMetrics, endpoints: Collection[str]) -> None:
        self._app, self._metrics, self._endpoints = app, metrics, frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = request_id_from(given)
        scope.setdefault("state", {}).update(request_id=request_id, send_part=send)
        status, is_complete = 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = [(name, request_id.encode()) for name in (b"x-baton-request-id", b"x-request-id")]
                message = {**message, "headers": [*message.get("headers", ()), *ids]}
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # the service's loop: say so, and live
            # Where, but not the message: it may quote what the client sent.
            log.error("request %s failed by a bug here: %s", request_id, type(error).__name__, exc_info=_silent(error))
            if not is_complete:
                raise _silent(error) from None  # the server closes the connection
        finally:
            endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
            model = scope["state"].get("model", "")
            self._metrics.answered(model, "http", endpoint, str(status or CLIENT_LEFT))


def _silent(error: Exception) -> BaseException:
    return RuntimeError("message withheld").with_traceback(error.__traceback__)
