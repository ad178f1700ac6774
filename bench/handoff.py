"""What prefilling elsewhere costs a request: `python -m bench.handoff [--json]`.

Time to first token of the same prompt, prefilled on the decode worker itself; on a prefill worker that streams the KV
blocks while it computes; and on one that sends them afterwards. Over shared memory, tcp on this machine, and tcp slowed
to 1 Gbit/s between two network namespaces (which takes root). Real workers, a process each with one torch thread; one
request at a time, asked of the decode worker as a router asks. Over shared memory a second decode worker, which does
not verify, shows what verification costs.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.decode_calls import RequestFailed
from bench.handoff_cluster import LINKS, Link, cluster
from bench.handoff_driver import WAYS, driving, measure
from bench.handoff_figures import Row, disagreements, prefill, ttft
from bench.models import Shape, make_model
from bench.netns import NoNamespaces
from bench.wide import wide_console
from bench.worker_processes import StartFailed

LENGTHS = (128, 512, 2000, 4096, 8192)
SHAPE = Shape(context=8448)
KNOWN_LINKS = {link.name: link for link in LINKS}
SENDS = ("streamed", "after_prefill")


async def measure_link(
    link: Link, model: Path, scratch: Path, lengths: Sequence[int], repeats: int, seed: int, advance: Callable[[], None]
) -> list[Row]:
    verifies = ("always", "never") if link.transport == "shm" else ("always",)
    with cluster(link, model, scratch, SENDS, verifies) as workers:
        async with driving(workers, SHAPE.vocabulary, seed) as driver:
            return await measure(driver, link.name, lengths, repeats, advance)


def measure_links(
    links: Sequence[Link], lengths: Sequence[int], repeats: int, seed: int, console: Console
) -> tuple[list[Row], dict[str, str]]:
    """And the links that could not be measured here, with the reason."""
    rows, left_out = list[Row](), dict[str, str]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="baton-") as scratch, Progress(*columns, console=console) as progress:
        make_model(model := Path(scratch) / "model", SHAPE)
        for link in links:
            advance = partial(progress.advance, progress.add_task(link.name, total=(repeats + 1) * len(lengths)))
            work = measure_link(link, model, Path(scratch), lengths, repeats, seed, advance)
            try:
                rows += uvloop.run(work)
            except (NoNamespaces, StartFailed) as error:
                left_out[link.name] = str(error)
    return rows, left_out


# ---- tables


def ttft_table(rows: Sequence[Row]) -> Table:
    made = Table(
        title="time to first token, ms: medians; and ratios: medians of each turn's, best over best",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    headings = ("tokens", "local", "streamed", "sent after", "no verify", "streamed/local", "best", "/after", "hidden")
    made.add_column("link")
    for heading in headings:
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(
            row.link,
            f"{row.tokens:,}",
            *(milliseconds(row.middle(way, ttft)) for way in WAYS),
            share(row.ratio("streamed", "local", ttft)),
            share(row.ratio_of_best("streamed", "local", ttft)),
            share(row.ratio("streamed", "send_after", ttft)),
            share(row.middle("streamed", lambda s: s.hidden_share)),
        )
    return made


def parts_table(rows: Sequence[Row]) -> Table:
    title = "where a streamed request's time to first token goes, ms (medians)"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    made.add_column("link")
    headings = ("tokens", "queue", "prefill queue", "prefill", "exposed", "rest", "transfer", "prefill / sent after")
    for heading in headings:
        made.add_column(heading, justify="right")
    for row in rows:
        parts = row.parts("streamed")
        names = ("queue_s", "prefill_queue_s", "prefill_s", "exposed_s", "rest_s", "transfer_s")
        slowed = share(row.ratio("streamed", "send_after", prefill))
        made.add_row(row.link, f"{row.tokens:,}", *(milliseconds(parts[name]) for name in names), slowed)
    return made


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:,.1f}"


def share(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1%}"


def parse_lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1 or max(lengths) >= SHAPE.context:
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 1 to {SHAPE.context - 1}, such as 512,2000")
    return lengths


def main(
    lengths: Annotated[str, typer.Option("--tokens", help="Prompt lengths")] = ",".join(map(str, LENGTHS)),
    links: Annotated[str, typer.Option(help="To measure")] = ",".join(KNOWN_LINKS),
    repeats: Annotated[int, typer.Option(min=1, help="Of each length, link and way")] = 9,
    seed: Annotated[int, typer.Option(help="Of the prompts")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
) -> None:
    """Measures time to first token prefilled here, and elsewhere with the KV blocks streamed or sent afterwards."""
    if unknown := [name for name in links.split(",") if name not in KNOWN_LINKS]:
        raise typer.BadParameter(f"{unknown[0]!r} is no link; there are {', '.join(KNOWN_LINKS)}")
    chosen, console = [KNOWN_LINKS[name] for name in links.split(",")], Console(stderr=True)
    try:
        rows, left_out = measure_links(chosen, parse_lengths(lengths), repeats, seed, console)
    except RequestFailed as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    wrong = sum(map(disagreeing, rows))
    if as_json:
        told = {"results": [row.as_json() for row in rows], "left_out": left_out, "wrong_first_tokens": wrong}
        typer.echo(json.dumps(told, indent=2))
    else:
        for table in (ttft_table(rows), parts_table(rows)):
            wide_console().print(table)
    for name, reason in left_out.items():
        console.print(f"{name} was left out: {reason}", markup=False)
    raise typer.Exit(int(wrong > 0))


def disagreeing(row: Row) -> int:
    ways = len({sample.way for sample in row.samples})
    turns = [row.samples[start : start + ways] for start in range(0, len(row.samples), ways)]
    return sum(map(disagreements, turns))


if __name__ == "__main__":
    typer.run(main)
