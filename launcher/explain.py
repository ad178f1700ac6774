"""`baton explain`: why a request was placed where it was, what else there was, and what became of it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.router_api import fetch, stranger

Fields = Mapping[str, Any]
"""A message of proto's Decision, Candidate and so on, as the HTTP API writes it."""

TERMS = {
    "queue_s": "queue",
    "restore_s": "restore",
    "prefill_s": "prefill",
    "transfer_s": "transfer",
    "admission_s": "admission",
    "decode_s": "decode",
    "others_decode_s": "others'\ndecode",
    "others_queue_s": "others'\nqueue",
    "others_evicted_s": "others'\nevicted",
}
"""In the order in which they are shown; their sum is `total_s`."""
SOURCES = {"hbm": "in HBM", "ddr": "restored from DDR", "ssd": "restored from SSD", "peer": "fetched"}
"""Where tokens come from that need not be computed."""
LOCAL = "(decode worker)"
"""Where the prompt is computed if no prefill worker is part of it."""
OUTCOMES = {"running": "runs", "finished": "finished", "failed": "failed", "cancelled": "was cancelled"}
CROWDED_COLUMNS = 9
EXCLUDED_SHOWN_MAX = 8
"""Workers named for one reason."""


def fetch_decision(url: str, request_id: str, api_key: str | None = None) -> Fields:
    """Raises what `fetch` raises: InvalidRequest if no router remembers the request."""
    decision = fetch(url, f"/v1/decisions/{quote(request_id, safe='')}", api_key)
    if not decision.get("placements"):
        raise stranger(url)
    return decision


def render(decision: Fields) -> RenderableType:
    placements = decision["placements"]
    parts = [part for placement in placements for part in (*explained(placement, len(placements) > 1), Text())]
    return Group(Text(f"Request {decision['request_id']}", style="bold"), Text(), *parts[:-1])


def explained(placement: Fields, is_one_of_several: bool) -> Iterable[RenderableType]:
    if is_one_of_several:
        yield Text(f"Choice {placement['choice']}, attempt {placement['attempt']}", style="bold")
    yield Text(summary(placement))
    yield Text()
    yield candidates_table(placement["candidates"])
    yield Text()
    if len(placement["candidates"]) > 1:
        yield Text(f"Chosen by {milliseconds(placement['margin_s'])} ms less than the next.")
    if sentence := cached_sentence(placement["candidates"][0]):
        yield Text(sentence)
    for sentence in excluded_sentences(placement["excluded"]):
        yield Text(sentence)
    yield Text(outcome_sentence(placement))
    if actual := placement.get("actual"):
        yield Text()
        yield outcome_table(placement["candidates"][0], actual)


def summary(placement: Fields) -> str:
    at = datetime.fromtimestamp(placement["decided_at"], UTC)
    return (
        f"{placement['prompt_tokens']:,} prompt tokens, placed by {placement['policy']} on router "
        f"{placement['router']} at {at:%Y-%m-%d %H:%M:%S} UTC, in {milliseconds(placement['decided_in_s'])} ms, from "
        f"{placement['candidates_considered']:,} candidates. In milliseconds:"
    )


def candidates_table(candidates: Sequence[Fields]) -> Table:
    """The chosen one first; without the columns that say nothing."""
    columns = [*pool_column(candidates), *cached_columns(candidates), *term_columns(candidates)]
    gap = 2 if len(columns) < CROWDED_COLUMNS else 1
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for header in ("", "prefill", "decode"):
        table.add_column(header, overflow="fold")
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for index, candidate in enumerate(candidates):
        workers = candidate["prefill_worker"] or LOCAL, candidate["decode_worker"]
        cells = (cell(candidate) for _, cell in columns)
        table.add_row("→" if index == 0 else "", *workers, *cells, style="bold green" if index == 0 else "")
    return table


Column = tuple[str, Callable[[Fields], str]]


def pool_column(candidates: Sequence[Fields]) -> Sequence[Column]:
    has_several = len({candidate["pool"] for candidate in candidates}) > 1
    return [("pool", lambda candidate: str(candidate["pool"]))] if has_several else []


def cached_columns(candidates: Sequence[Fields]) -> Sequence[Column]:
    is_any_cached = any(map(cached_tokens, candidates))
    return [("cached\ntokens", lambda candidate: f"{cached_tokens(candidate):,}")] if is_any_cached else []


def term_columns(candidates: Sequence[Fields]) -> Sequence[Column]:
    def column(name: str, header: str) -> Column:
        return header, lambda candidate: milliseconds(candidate[name])

    shown = [name for name in TERMS if any(candidate[name] for candidate in candidates)]
    return [*(column(name, TERMS[name]) for name in shown), column("total_s", "total")]


def cached_tokens(candidate: Fields) -> int:
    """Where the prompt is computed, in all tiers, and what is fetched before."""
    return int(sum(candidate.get(f"cached_tokens_{source}", 0) for source in SOURCES))


def cached_sentence(candidate: Fields) -> str:
    """Where the chosen one finds what it need not compute; empty where that is HBM, or nothing."""
    where = {**SOURCES, "peer": f"fetched from {candidate.get('fetch_from')}"}
    counts = {source: int(candidate.get(f"cached_tokens_{source}", 0)) for source in SOURCES}
    if not any(counts[source] for source in SOURCES if source != "hbm"):
        return ""
    parts = [f"{count:,} {where[source]}" for source, count in counts.items() if count]
    return f"Of the prompt's tokens, not computed: {', '.join(parts)}."


def excluded_sentences(excluded: Sequence[Fields]) -> Iterable[str]:
    """One a reason."""
    workers = defaultdict[str, list[str]](list)
    for one in excluded:
        workers[one["reason"]].append(one["worker"])
    for reason, names in workers.items():
        hidden = len(names) - EXCLUDED_SHOWN_MAX
        more = f" and {hidden} more" if hidden > 0 else ""
        yield f"Excluded: {', '.join(names[:EXCLUDED_SHOWN_MAX])}{more} ({reason})."


def outcome_sentence(placement: Fields) -> str:
    actual = placement.get("actual")
    if not actual:
        return "No token has come of it yet."
    what = OUTCOMES.get(actual["outcome"], actual["outcome"])
    if not has_ended(actual):
        return f"The request {what}."
    planned, used = placement["candidates"][0]["prefill_worker"], actual["prefill_worker"]
    elsewhere = "" if used == planned else f" Its prompt was computed on {used or 'the decode worker'}, not as planned."
    return f"The request {what}, with {actual['completion_tokens']:,} tokens generated.{elsewhere}"


def outcome_table(predicted: Fields, actual: Fields) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for header in ("predicted", "measured"):
        table.add_column(header, justify="right")
    for row in (*(phase_rows(predicted, actual) if has_ended(actual) else ()), *total_rows(predicted, actual)):
        table.add_row(*row)
    return table


def has_ended(actual: Fields) -> bool:
    """Only then the worker has told how long each phase took."""
    return bool(actual["outcome"] != "running")


def phase_rows(predicted: Fields, actual: Fields) -> Iterable[Sequence[str]]:
    waits = predicted["queue_s"] + predicted["admission_s"], actual["queue_s"] + actual["prefill_queue_s"]
    yield in_milliseconds("queue and admission", *waits)
    computing = predicted["restore_s"] + predicted["prefill_s"], actual["prefill_s"] + actual.get("fetch_s", 0.0)
    yield in_milliseconds("restore and prefill", *computing)
    yield in_milliseconds("transfer not hidden", predicted["transfer_s"], actual["transfer_exposed_s"])


def total_rows(predicted: Fields, actual: Fields) -> Iterable[Sequence[str]]:
    yield in_milliseconds("time to first token", predicted["ttft_s"], actual["ttft_s"])
    if actual["itl_s"]:
        yield in_milliseconds("inter-token latency", predicted["itl_s"], actual["itl_s"])
    yield "cached tokens", f"{cached_tokens(predicted):,}", f"{actual['cached_tokens']:,}"
    for what, sources in (("restored", ("ddr", "ssd")), ("fetched", ("peer",))):
        counts = sum(predicted.get(f"cached_tokens_{source}", 0) for source in sources), actual.get(f"{what}_tokens", 0)
        if any(counts):
            yield f"{what} tokens", *(f"{count:,}" for count in counts)


def in_milliseconds(what: str, predicted_s: float, measured_s: float) -> Sequence[str]:
    return f"{what}, ms", milliseconds(predicted_s), milliseconds(measured_s)


def milliseconds(seconds: float) -> str:
    """Three digits or so."""
    value = seconds * 1000
    return (
        f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 0.1 or not value else f"{value:.2f}"
    )
