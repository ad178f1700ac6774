"""What the command line asks of a router, over HTTP."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from baton.errors import BatonError, InvalidRequest, SettingsError, Unavailable

TIMEOUT_S = 5.0
REPLY_BYTES_MAX = 64 * 2**20
DEFAULT_URL = "http://127.0.0.1:8000"


def fetch(
    url: str,
    path: str,
    api_key: str | None = None,
    body: Mapping[str, Any] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """The JSON object at a path of the router at `url`; with a body, its answer to a POST of that.

    Raises SettingsError if that is no URL, InvalidRequest or Unavailable with the router's own sentence if it
    refuses, and Unavailable if no router of Baton's answers there.
    """
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"{url} is not a router's URL: it should look like http://HOST:PORT.")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    if body is not None:
        headers["content-type"] = "application/json"
    try:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{url.rstrip('/')}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return dict(json.loads(reply.read(REPLY_BYTES_MAX)))
    except urllib.error.HTTPError as error:
        raise _refusal(url, error) from None
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise Unavailable(f"No router can be reached at {url} ({reason}); name another with --url.") from None
    except OSError as error:
        raise Unavailable(f"The router at {url} did not answer ({error}).") from None
    except (ValueError, TypeError, http.client.HTTPException):  # the last: whoever answered does not speak HTTP
        raise stranger(url) from None


def stranger(url: str) -> Unavailable:
    return Unavailable(f"{url} answered, but not as a Baton router does.")


def _refusal(url: str, error: urllib.error.HTTPError) -> BatonError:
    with error:
        try:
            sentence = str(json.loads(error.read(REPLY_BYTES_MAX))["error"]["message"])
        except (OSError, ValueError, KeyError, TypeError):
            return Unavailable(f"{url} answered {error.code}: it is no Baton router.")
    return InvalidRequest(sentence) if error.code < 500 else Unavailable(sentence)
