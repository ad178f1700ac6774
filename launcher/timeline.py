"""Draws where one request's time went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 36
"""Columns that the whole request is drawn in."""

Timeline = Mapping[str, Any]
"""The fields of proto's Timeline, as the HTTP API tells them when asked to."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A span on the request's own clock, which starts when it reaches the decode worker."""

    label: str
    start_s: float
    end_s: float
    note: str
    style: str
    exposed_from_s: float | None = None
    """From here on the span was not hidden under other work."""


def bars(timeline: Timeline) -> Sequence[Bar]:
    """The request's phases in order. Of the transfer only its end is measured, not each slice: it is drawn from
    the prefill's start, since slices leave from then on, and its note tells how long writing them took."""
    prefill_at_s = timeline["queue_s"] + timeline["prefill_queue_s"]
    prefilled_s = prefill_at_s + timeline["prefill_s"]
    first_token_s = timeline["first_token_s"]
    drawn = [
        Bar("queue", 0.0, prefill_at_s, milliseconds(prefill_at_s), "yellow"),
        Bar("prefill", prefill_at_s, prefilled_s, prefill_note(timeline), "cyan"),
    ]
    if timeline["transport"]:
        landed_s = prefilled_s + timeline["transfer_exposed_s"]
        drawn.append(Bar("transfer", prefill_at_s, landed_s, transfer_note(timeline), "green", prefilled_s))
    return [
        *drawn,
        Bar("first token", first_token_s, first_token_s, f"after {milliseconds(first_token_s)}", "bold magenta"),
        Bar("decode", first_token_s, first_token_s + timeline["decode_s"], milliseconds(timeline["decode_s"]), "blue"),
    ]


def prefill_note(timeline: Timeline) -> str:
    """How long it took, and what of the prompt came up from a lower tier or from another worker instead."""
    note = milliseconds(timeline["prefill_s"])
    for what, seconds in (("restored", "restore_s"), ("fetched", "fetch_s")):
        if tokens := timeline.get(f"{what}_tokens"):
            note += f"; {tokens:,} tokens {what} in {milliseconds(timeline[seconds])}"
    return note


def transfer_note(timeline: Timeline) -> str:
    megabytes = timeline["transfer_bytes"] / 1e6
    return (
        f"{milliseconds(timeline['transfer_s'])}, {hidden_share(timeline):.0%} hidden; "
        f"{megabytes:,.1f} MB by {timeline['transport']}"
    )


def hidden_share(timeline: Timeline) -> float:
    """How much of the time spent writing slices passed under the prefill, in [0, 1]."""
    busy, exposed = timeline["transfer_s"], timeline["transfer_exposed_s"]
    return 1.0 - min(1.0, exposed / busy) if busy > 0 else 1.0


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def render(timeline: Timeline) -> RenderableType:
    drawn = bars(timeline)
    total_s = max(bar.end_s for bar in drawn)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=WIDTH, no_wrap=True)
    table.add_column()
    for bar in drawn:
        table.add_row(bar.label, picture(bar, total_s), bar.note)
    return table


def picture(bar: Bar, total_s: float, width: int = WIDTH) -> Text:
    """The span on a line of `width` columns, at least one column long; what was not hidden is drawn solid."""

    def column(at_s: float) -> int:
        return min(width - 1, int(width * at_s / total_s)) if total_s > 0 else 0

    start, end = column(bar.start_s), column(bar.end_s)
    if bar.start_s == bar.end_s:
        return Text(" " * start) + Text("◆", bar.style)
    hidden = 0 if bar.exposed_from_s is None else column(bar.exposed_from_s) - start
    if bar.exposed_from_s is not None and end == column(bar.exposed_from_s):
        hidden += 1  # less than a column was not
    return Text(" " * start) + Text("░" * hidden + "█" * (end - start + 1 - hidden), bar.style)
