"""Load on any OpenAI-compatible server: `python -m bench.serve --url URL --model M --concurrency 1,8,32`.

Closed loop: at each level so many clients send a completion of random token ids, read its stream to the
end and send the next, until the level's requests are done. One request a client comes before, as a warm-up.
"""

import json
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated

import typer
import uvloop
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.load import FIRST_TOKEN_ID, Client, Load
from bench.measure import Failed, Figures, summarize
from bench.sse import Endpoint

COLUMNS: dict[str, Callable[[Figures], str]] = {
    "streams": lambda f: str(f.concurrency),
    "TTFT ms\np50 / p99": lambda f: milliseconds(f.ttft_p50_s, f.ttft_p99_s),
    "ITL ms\np50 / p99": lambda f: milliseconds(f.itl_p50_s, f.itl_p99_s),
    "e2e ms\np50 / p99": lambda f: milliseconds(f.e2e_p50_s, f.e2e_p99_s),
    "tok/s\nout": lambda f: f"{f.output_tokens_per_s:,.0f}",
    "tok/s\nin": lambda f: f"{f.input_tokens_per_s:,.0f}",
    "done": lambda f: str(f.requests - f.failures),
    "failed": lambda f: str(f.failures),
}


def milliseconds(*seconds: float | None) -> str:
    return " / ".join("–" if s is None else f"{s * 1000:.{1 if s < 0.1 else 0}f}" for s in seconds)


def table(levels: Sequence[Figures], title: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        made.add_column(name, justify="right")
    for figures in levels:
        made.add_row(*(cell(figures) for cell in COLUMNS.values()))
    return made


async def measure(
    client: Client, concurrency: int, requests: Iterator[bytes], count: int, advance: Callable[[], None]
) -> Figures:
    """One level. Where not one warm-up request is answered, those failures are its result."""
    warm_up = await client.run(concurrency, [next(requests) for _ in range(concurrency)], advance)
    if all(isinstance(outcome, Failed) for outcome in warm_up):
        return summarize(concurrency, warm_up, 0)
    measured = [next(requests) for _ in range(count)]
    cpu_s = time.process_time()
    outcomes = await client.run(concurrency, measured, advance)
    return summarize(concurrency, outcomes, time.process_time() - cpu_s)


async def measure_levels(
    client: Client, levels: Sequence[int], requests: Iterator[bytes], count: int | None, console: Console
) -> list[Figures]:
    """One level after another, with a progress bar for each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    figures = []
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        for concurrency in levels:
            level_count = count or max(16, 4 * concurrency)
            bar = progress.add_task(f"{concurrency} streams", total=concurrency + level_count)
            advance = partial(progress.advance, bar)
            figures.append(await measure(client, concurrency, requests, level_count, advance))
    return figures


def parse_levels(text: str) -> list[int]:
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = [0]
    if min(levels) < 1 or max(levels) > 4096:
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 1 to 4096, such as 1,8,32")
    return levels


def parse_endpoint(url: str) -> Endpoint:
    try:
        return Endpoint.parse(url)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def main(
    url: Annotated[Endpoint, typer.Option(parser=parse_endpoint, help="Server, such as http://127.0.0.1:8000")],
    model: Annotated[str, typer.Option(help="Model name, as in /v1/models")],
    concurrency: Annotated[str, typer.Option(help="Streams at a time, level after level")] = "1,8,32",
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Tokens in a prompt")] = 512,
    output_tokens: Annotated[int, typer.Option("--output", min=1, help="Tokens in a completion")] = 64,
    requests: Annotated[int | None, typer.Option(min=1, help="A level; default: max(16, 4 × concurrency)")] = None,
    shared_prefix: Annotated[int, typer.Option(min=0, help="Input tokens that all prompts start with")] = 0,
    vocabulary: Annotated[
        int, typer.Option(min=FIRST_TOKEN_ID + 2, help=f"Token ids run from {FIRST_TOKEN_ID} to one below this")
    ] = 1000,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that a request may take")] = 600,
    seed: Annotated[
        int | None, typer.Option(help="Of the prompts; default: drawn, so that no run finds a cache")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
) -> None:
    """Measures time to first token, inter-token latency and throughput of an OpenAI-compatible server.

    Exits with 1 if any request failed.
    """
    if shared_prefix > input_tokens:
        raise typer.BadParameter("--shared-prefix must not be more than --input")
    load = Load(model, input_tokens, output_tokens, shared_prefix, vocabulary)
    randomness = random.Random(secrets.randbits(64) if seed is None else seed)
    prepared = (url.post("/v1/completions", body, api_key) for body in load.bodies(randomness))
    console = Console(stderr=True)
    levels = uvloop.run(measure_levels(Client(url, timeout_s), parse_levels(concurrency), prepared, requests, console))
    if as_json:
        typer.echo(json.dumps([figures.as_json() for figures in levels], indent=2))
    else:
        Console().print(table(levels, f"{model}: {input_tokens} tokens in, {output_tokens} out"))
    for figures in levels:
        for reason, count in figures.errors.items():
            console.print(f"error: {count} of {figures.requests} requests failed: {reason}", markup=False)
    raise typer.Exit(int(any(figures.failures for figures in levels)))


if __name__ == "__main__":
    typer.run(main)
