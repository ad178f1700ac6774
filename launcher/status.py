"""`baton status`: what the router knows about its workers, as a table."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from baton.errors import SettingsError, Unavailable

TIMEOUT_S = 5.0
REPLY_BYTES_MAX = 64 * 2**20
STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow"}

WorkerStatus = Mapping[str, Any]
"""One worker as the router's `GET /v1/workers` describes it."""


def fetch_workers(url: str) -> Sequence[WorkerStatus]:
    """Raises Unavailable if no router of Baton's answers there."""
    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"{url} is not a router's URL: it should look like http://HOST:PORT.")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/workers", timeout=TIMEOUT_S) as reply:
            return list(json.loads(reply.read(REPLY_BYTES_MAX))["data"])
    except urllib.error.HTTPError as error:
        raise Unavailable(f"{url} answered {error.code}: it is no Baton router.") from None
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise Unavailable(f"No router can be reached at {url} ({reason}); name another with --url.") from None
    except OSError as error:
        raise Unavailable(f"The router at {url} did not answer ({error}).") from None
    except (ValueError, KeyError, TypeError):
        raise Unavailable(f"{url} answered, but not as a Baton router does.") from None


def render(workers: Sequence[WorkerStatus]) -> RenderableType:
    if not workers:
        return Text("The router runs, but no worker has announced itself.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("worker", "role", "model", "state", "address"):
        table.add_column(column, no_wrap=column != "model", overflow="fold")
    for column in ("running", "waiting", "KV blocks"):
        table.add_column(column, justify="right", no_wrap=True)
    for worker in sorted(workers, key=lambda worker: (worker["role"] != "prefill", worker["worker_id"])):
        table.add_row(*row(worker))
    return table


def row(worker: WorkerStatus) -> Sequence[str | Text]:
    return (
        str(worker["worker_id"]),
        str(worker["role"]),
        str(worker["model"]),
        state(worker),
        str(worker["address"]),
        f"{worker['running_sequences']:,}",
        f"{worker['waiting_sequences']:,}",
        f"{worker['kv_blocks_used']:,}/{worker['kv_blocks_total']:,}",
    )


def state(worker: WorkerStatus) -> Text:
    if not worker.get("reachable", True):
        return Text("unreachable", style="red")
    return Text(str(worker["state"]), style=STATE_STYLES.get(str(worker["state"]), ""))
