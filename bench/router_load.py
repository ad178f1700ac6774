"""The router alone under load: `python -m bench.router_load`.

Three processes: a router, decode workers that are stubs (a token a step, no engine), and this one, which generates the
load. So the CPU time of the router's process is the router's own: doors, tokenizer and detokenizer, placement, streams.
Closed loop: at each level so many clients send a chat of real text, read its stream to the end and send the next.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from baton.process import raise_descriptor_limit
from baton.rpc import common_pb2, inference_pb2
from bench import child
from bench.child import Child
from bench.grpc_load import GrpcClient
from bench.load import Client
from bench.measure import Figures, Outcome, summarize
from bench.router_processes import MODEL, Doors, run_router, run_workers
from bench.serve import milliseconds, parse_levels
from bench.sse import Endpoint
from bench.text_model import english, save_text_model
from bench.where import shares

TIMEOUT_S = 600.0
Door = Literal["http", "grpc"]
DOORS: tuple[Door, ...] = ("http", "grpc")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the requests."""

    prompt_characters: int
    output_tokens: int

    def questions(self, randomness: random.Random) -> Iterator[str]:
        text = english()
        while True:
            start = randomness.randrange(len(text) - self.prompt_characters)
            yield text[start : start + self.prompt_characters]

    def http(self, endpoint: Endpoint, question: str) -> bytes:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return endpoint.post("/v1/chat/completions", body)

    def grpc(self, question: str) -> inference_pb2.GenerateRequest:
        sampling = common_pb2.SamplingParams(max_tokens=self.output_tokens, temperature=0)
        return inference_pb2.GenerateRequest(model=MODEL, text=question, sampling=sampling)


@dataclass(frozen=True, slots=True)
class Level:
    door: Door
    figures: Figures
    router_cpu_s: float

    def as_json(self) -> dict[str, Any]:
        figures = self.figures
        return {
            "door": self.door,
            "concurrency": figures.concurrency,
            "requests_per_s": self.requests_per_s,
            "tokens_per_s": figures.output_tokens_per_s,
            "cpu_per_request_s": self.cpu_per_request_s,
            "cpu_per_token_s": self.cpu_per_token_s,
            "router_cpu_share": self.router_cpu_share,
        } | asdict(figures)

    @property
    def requests_per_s(self) -> float:
        return (self.figures.requests - self.figures.failures) / max(self.figures.duration_s, 1e-9)

    @property
    def cpu_per_request_s(self) -> float:
        return self.router_cpu_s / self.figures.requests

    @property
    def cpu_per_token_s(self) -> float:
        return self.router_cpu_s / max(1, self.figures.output_tokens)

    @property
    def router_cpu_share(self) -> float:
        """Of one core."""
        return self.router_cpu_s / max(self.figures.duration_s, 1e-9)


@dataclass(frozen=True, slots=True)
class Bench:
    router: Child
    doors: Doors
    shape: Shape
    questions: Iterator[str]

    def measure(self, door: Door, concurrency: int, count: int) -> Level:
        """One level, after a warm-up of one request a client."""
        self._run(door, concurrency, concurrency)
        before_s, own_s = self.router.cpu_s, time.process_time()
        outcomes = self._run(door, concurrency, count)
        own_s = time.process_time() - own_s
        return Level(door, summarize(concurrency, outcomes, own_s), self.router.cpu_s - before_s)

    def profile(self, door: Door, concurrency: int, count: int) -> dict[str, float]:
        """Where the router's CPU time goes, as shares; the profile itself makes Python's part look larger."""
        before_s = self.router.cpu_s
        self.router.start_profile()
        self._run(door, concurrency, count)
        stats = self.router.stop_profile()
        return shares(stats, self.router.cpu_s - before_s)

    def _run(self, door: Door, concurrency: int, count: int) -> list[Outcome]:
        questions = islice(self.questions, count)
        if door == "grpc":
            messages = list(map(self.shape.grpc, questions))
            return uvloop.run(GrpcClient(self.doors.grpc_address, TIMEOUT_S).run(concurrency, messages, _nothing))
        endpoint = Endpoint.parse(self.doors.http_url)
        prepared = [self.shape.http(endpoint, question) for question in questions]
        return uvloop.run(Client(endpoint, TIMEOUT_S).run(concurrency, prepared, _nothing))


def _nothing() -> None:
    pass


COLUMNS: dict[str, Callable[[Level], str]] = {
    "door": lambda level: level.door,
    "at once": lambda level: str(level.figures.concurrency),
    "req/s": lambda level: f"{level.requests_per_s:,.0f}",
    "tok/s": lambda level: f"{level.figures.output_tokens_per_s:,.0f}",
    "CPU µs\n/ tok": lambda level: f"{level.cpu_per_token_s * 1e6:.0f}",
    "ms\n/ req": lambda level: f"{level.cpu_per_request_s * 1e3:.1f}",
    "of a\ncore": lambda level: f"{level.router_cpu_share:.0%}",
    "TTFT ms\np50 / p99": lambda level: milliseconds(level.figures.ttft_p50_s, level.figures.ttft_p99_s),
    "failed": lambda level: str(level.figures.failures),
}


def table(levels: Sequence[Level], title: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in COLUMNS:
        made.add_column(heading, justify="right")
    for level in levels:
        made.add_row(*(cell(level) for cell in COLUMNS.values()))
    return made


def where_table(places: dict[Door, dict[str, float]], concurrency: int) -> Table:
    made = Table(title=f"where the router's CPU goes, {concurrency} streams", title_justify="left", box=box.SIMPLE_HEAD)
    made.add_column("")
    for door in places:
        made.add_column(door, justify="right")
    for place in max(places.values(), key=len):
        made.add_row(place, *(f"{by_place.get(place, 0):.0%}" for by_place in places.values()))
    return made


def parse_doors(text: str) -> list[Door]:
    chosen = [door for door in DOORS if door in text.split(",")]
    if sorted(chosen) != sorted(text.split(",")):
        raise typer.BadParameter(f"{text!r} is not http, grpc or both with a comma between them")
    return chosen


def main(
    concurrency: Annotated[str, typer.Option(help="Streams at a time, level after level")] = "1,10,100,1000",
    door: Annotated[str, typer.Option(help="http, grpc, or both with a comma between them")] = "http,grpc",
    requests: Annotated[int | None, typer.Option(min=1, help="A level; default: max(16, 4 × concurrency)")] = None,
    prompt: Annotated[int, typer.Option(min=1, max=100_000, help="Characters of a prompt")] = 1000,
    output: Annotated[int, typer.Option(min=1, max=10_000, help="Tokens of an answer")] = 64,
    step_ms: Annotated[float, typer.Option(min=0, help="Of the stubs: a token for each of their sequences")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Stub decode workers")] = 4,
    profile: Annotated[int, typer.Option(min=0, help="Streams to profile at; 0: do not")] = 100,
    seed: Annotated[int, typer.Option(help="Of the prompts")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
) -> None:
    """Measures what the router itself costs: requests and tokens per second, CPU per request and token, where it goes.

    Exits with 1 if any request failed.
    """
    doors, concurrencies = parse_doors(door), parse_levels(concurrency)
    raise_descriptor_limit()
    levels, places = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        text = save_text_model(Path(scratch))
        with (
            child.running(run_workers, text, workers, step_ms / 1000) as stubs,
            child.running(run_router, Path(scratch), stubs.ready) as router,
        ):
            shape = Shape(prompt, output)
            bench = Bench(router, router.ready, shape, shape.questions(random.Random(seed)))
            for each in doors:
                levels += [bench.measure(each, n, requests or max(16, 4 * n)) for n in concurrencies]
                if profile:
                    places[each] = bench.profile(each, profile, 4 * profile)
    if as_json:
        typer.echo(json.dumps({"levels": [level.as_json() for level in levels], "where": places}, indent=2))
    else:
        Console().print(table(levels, f"{prompt} characters in, {output} tokens out, a step every {step_ms:g} ms"))
        if places:
            Console().print(where_table(places, profile))
    raise typer.Exit(int(any(level.figures.failures for level in levels)))


if __name__ == "__main__":
    typer.run(main)
