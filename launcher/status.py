"""`baton status`: what the router knows about its workers, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from launcher.router_api import fetch, stranger

STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow"}

WorkerStatus = Mapping[str, Any]
"""One worker as the router's `GET /v1/workers` describes it."""


def fetch_workers(url: str, api_key: str | None = None) -> Sequence[WorkerStatus]:
    """Raises what `fetch` raises."""
    try:
        return list(fetch(url, "/v1/workers", api_key)["data"])
    except (KeyError, TypeError):
        raise stranger(url) from None


def render(workers: Sequence[WorkerStatus]) -> RenderableType:
    if not workers:
        return Text("The router runs, but no worker has announced itself.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("worker", "role", "model", "pool", "state", "address"):
        table.add_column(column, no_wrap=column not in ("model", "pool"), overflow="fold")
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
        str(worker.get("pool", "")),
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
