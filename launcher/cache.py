"""`baton cache`: what the workers' tiers hold and how often they are hit, as tables; and clearing them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.router_api import fetch, stranger

Fields = Mapping[str, Any]
"""An object of the router's `GET /v1/cache`."""
BAR_COLUMNS = 8
HASH_DIGITS = 12
"""Of a prefix's 32: enough to tell those of one table apart."""
CLEAR_TIMEOUT_S = 15.0
TIER_NAMES = {"hbm": "HBM", "ddr": "DDR", "ssd": "SSD", "peer": "fetched"}


def fetch_cache(url: str, top: int, api_key: str | None = None) -> Fields:
    """Raises what `fetch` raises."""
    cache = fetch(url, f"/v1/cache?top={top}", api_key)
    if not isinstance(cache.get("workers"), list):
        raise stranger(url)
    return cache


def clear_cache(url: str, tenant: str | None, api_key: str | None = None) -> Fields:
    """Raises what `fetch` raises."""
    cleared = fetch(url, "/v1/cache/clear", api_key, {"tenant": tenant} if tenant else {}, CLEAR_TIMEOUT_S)
    if not isinstance(cleared.get("workers"), list):
        raise stranger(url)
    return cleared


# ---- what there is


def render(cache: Fields) -> RenderableType:
    if not cache["workers"]:
        return Text("The router runs, but no worker has announced itself.")
    parts: list[RenderableType] = [tiers_table(cache["workers"]), Text(), Text(rates(cache)), *troubles(cache)]
    if cache["top_prefixes"]:
        parts += [Text(), prefixes_table(cache["top_prefixes"])]
    return Group(*parts)


def tiers_table(workers: Sequence[Fields]) -> Table:
    """A row for each worker and tier."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("worker", overflow="fold")
    table.add_column("tier", no_wrap=True)
    table.add_column("blocks", justify="right", no_wrap=True)
    table.add_column("used", no_wrap=True)
    for column in ("hit tokens", "hit rate", "promised", "restore"):
        table.add_column(column, justify="right", no_wrap=True)
    for worker in in_order(workers):
        for row in worker_rows(worker):
            table.add_row(*row)
    return table


def in_order(workers: Sequence[Fields]) -> Sequence[Fields]:
    return sorted(workers, key=lambda worker: (worker["role"] != "prefill", worker["worker_id"]))


def worker_rows(worker: Fields) -> Iterable[Sequence[str | Text]]:
    name = str(worker["worker_id"])
    if not worker["reachable"]:
        yield name, "", "", Text("unreachable", style="red")
    elif not worker["tiers"]:
        yield name, "", "", "keeps nothing"
    for index, tier in enumerate(worker["tiers"]):
        yield (
            "" if index else name,
            tier_name(tier),
            f"{tier['blocks']:,}",
            used(tier),
            f"{tier['hit_tokens']:,}",
            percent(tier["hit_tokens"], worker["queried_tokens"]),
            size(tier["retained_bytes"]) if tier["retained_bytes"] else "",
            restore(tier),
        )


def tier_name(tier: Fields) -> str:
    return TIER_NAMES.get(tier["tier"], str(tier["tier"]))


def restore(tier: Fields) -> str | Text:
    """How fast blocks come up from there."""
    if tier["off_reason"]:
        return Text("off", style="red")
    return f"{size(tier['restore_bytes_per_s'])}/s" if tier["restore_bytes_per_s"] else ""


def used(tier: Fields) -> Text:
    """A bar, as long as the tier is full; something is there where anything is."""
    share = min(1.0, tier["bytes"] / tier["bytes_max"]) if tier["bytes_max"] else 0.0
    filled = max(round(share * BAR_COLUMNS), bool(share))
    bar = Text("█" * filled, style="cyan") + Text("░" * (BAR_COLUMNS - filled))
    return bar + Text(f" {size(tier['bytes'])} of {size(tier['bytes_max'])}")


def rates(cache: Fields) -> str:
    """The cluster's hits, by where they were found."""
    if not cache["queried_tokens"]:
        return "No prompt has been looked up yet."
    found = ", ".join(f"{cache['hit_rates'][tier]:.1%} {name}" for tier, name in TIER_NAMES.items())
    return f"Of {cache['queried_tokens']:,} prompt tokens looked up: {found}."


def troubles(cache: Fields) -> Iterable[Text]:
    for worker in in_order(cache["workers"]):
        for tier in worker["tiers"]:
            if tier["off_reason"]:
                yield Text(f"{tier_name(tier)} of {worker['worker_id']} is off: {tier['off_reason']}", style="red")
    if cache["corrupt_blocks"]:
        yield Text(f"{cache['corrupt_blocks']:,} blocks did not match their digests and were computed again.", "red")
    if cache["dropped_blocks"]:
        yield Text(f"{cache['dropped_blocks']:,} blocks were given up for want of room.")


def prefixes_table(prefixes: Sequence[Fields]) -> Table:
    """By the hashes of their last blocks: a name, from which no prompt can be read."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("prefix", no_wrap=True)
    table.add_column("tier", no_wrap=True)
    for column in ("tokens", "uses", "workers"):
        table.add_column(column, justify="right", no_wrap=True)
    for prefix in prefixes:
        counts = (prefix["tokens"], prefix["uses"], len(prefix["workers"]))
        table.add_row(str(prefix["hash"])[:HASH_DIGITS], tier_name(prefix), *(f"{count:,}" for count in counts))
    return table


# ---- clearing


def question(tenant: str | None) -> str:
    whose = f"all KV of the tenant {tenant}" if tenant else "all cached KV, of everybody,"
    return (
        f"Forget {whose} on every worker, in every tier, what was promised to be kept included? "
        "Requests that run go on; later ones compute their prompts anew."
    )


def cleared_sentences(cleared: Fields) -> Iterable[Text]:
    reached = [worker for worker in cleared["workers"] if worker["reachable"]]
    yield Text(f"Freed {cleared['blocks']:,} blocks, {size(cleared['bytes'])}, on {len(reached)} workers.")
    for worker in missed(cleared):
        yield Text(f"{worker['worker_id']} was not cleared: {worker['error']}.", style="red")


def missed(cleared: Fields) -> list[Fields]:
    return [worker for worker in cleared["workers"] if not worker["reachable"]]


# ---- numbers


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def size(count: float) -> str:
    """Three digits or so."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
