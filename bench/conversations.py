"""Conversations on a Baton of this machine, under one placement policy after another: `python -m bench.conversations`.

Each conversation starts with one of a few system prompts and goes on for some turns; a turn's prompt is all that was
said before, in token ids, and something new. So most of every prompt but the first lies in some worker's cache, and
what a policy is worth shows in how much of it is found, and in the time to first token. For each policy a `baton up` is
started, measured and stopped; passes alternate between the policies, so that a drift of the machine hits all alike.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, get_args

import typer
import uvloop
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from baton.clock import monotonic
from baton.settings import Policy
from bench.load import FIRST_TOKEN_ID, Client
from bench.models import Shape, make_model
from bench.sse import Endpoint
from bench.talk import TURN_TIMEOUT_S, Pass, Talk, converse, summarize

STOP_TIMEOUT_S = 60.0


@contextmanager
def baton_up(policy: str, model: Path, name: str, prefill: int, decode: int, options: Sequence[str]) -> Iterator[str]:
    """A whole Baton; yields the router's URL."""
    command = [sys.executable, "-m", "launcher", "up", "--http-port=0", f"--policy={policy}", f"--model={model}"]
    command += [f"--served-model-name={name}", f"--prefill={prefill}", f"--decode={decode}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline().split()
            if not ready:
                raise typer.BadParameter(f"`baton up --policy={policy}` did not start; what it said is above")
            yield ready[1]
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            finally:
                process.kill()


def run_pass(policy: str, model: Path, talk: Talk, up: dict[str, Any], seed: int, advance: Callable[[], None]) -> Pass:
    with baton_up(policy, model, "bench", **up) as url:
        endpoint = Endpoint.parse(url)
        warm_up = Client(endpoint, TURN_TIMEOUT_S)
        body = {"model": "bench", "prompt": [FIRST_TOKEN_ID] * 600, "max_tokens": 8, "ignore_eos": True, "stream": True}
        started = [endpoint.post("/v1/completions", body | {"stream_options": {"include_usage": True}})] * 4
        uvloop.run(warm_up.run(4, started, lambda: None))
        result = summarize(policy, uvloop.run(converse(endpoint, "bench", talk, seed, advance)))
    if result is None:
        raise typer.BadParameter(f"under {policy} no turn was answered")
    return result


def table(passes: Sequence[Pass], title: str) -> Table:
    """One row a policy: the mean over its passes."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("policy", "hit rate", "TTFT mean", "p50", "p99 ms", "later turns", "e2e mean s", "failed"):
        made.add_column(heading, justify="left" if heading == "policy" else "right")
    for policy in dict.fromkeys(one.policy for one in passes):
        own = [one for one in passes if one.policy == policy]

        def mean(figure: Callable[[Pass], float], own: Sequence[Pass] = own) -> float:
            return fmean(map(figure, own))

        made.add_row(
            policy,
            f"{mean(lambda p: p.hit_rate):.1%}",
            *(
                f"{1000 * seconds:,.0f}"
                for seconds in (
                    mean(lambda p: p.ttft_mean_s),
                    mean(lambda p: p.ttft_p50_s),
                    mean(lambda p: p.ttft_p99_s),
                    mean(lambda p: p.later_ttft_mean_s),
                )
            ),
            f"{mean(lambda p: p.e2e_mean_s):.2f}",
            str(sum(one.failures for one in own)),
        )
    return made


def main(
    policies: Annotated[str, typer.Option(help="Separated by commas")] = "least-added-latency,round-robin",
    model: Annotated[Path | None, typer.Option(help="Model directory; default: a random 28 M Llama")] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers")] = 2,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers")] = 2,
    conversations: Annotated[int, typer.Option(min=1)] = 24,
    turns: Annotated[int, typer.Option(min=1, help="Of each conversation")] = 5,
    system_prompts: Annotated[int, typer.Option(min=1, help="Different ones")] = 3,
    system: Annotated[int, typer.Option(min=1, help="Tokens of a system prompt")] = 512,
    user: Annotated[int, typer.Option(min=1, help="Tokens of a question")] = 128,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, help="Conversations at a time")] = 6,
    think: Annotated[float, typer.Option(min=0, help="Seconds between an answer and the next question, mean")] = 0.5,
    passes: Annotated[int, typer.Option(min=1, help="For each policy")] = 2,
    seed: Annotated[int, typer.Option(help="Of the conversations; each pass has its own")] = 0,
    up_option: Annotated[list[str] | None, typer.Option(help="More for `baton up`, such as --kv-blocks=512")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
) -> None:
    """Compares placement policies on real workers: multi-turn conversations, hit rate and time to first token."""
    chosen = policies.split(",")
    for policy in chosen:
        if policy not in get_args(Policy):
            raise typer.BadParameter(f"{policy!r} is no policy; there are {', '.join(get_args(Policy))}")
    talk = Talk(
        conversations, turns, system_prompts, system, user, output, concurrency, think, vocabulary=Shape().vocabulary
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results, up = [], {"prefill": prefill, "decode": decode, "options": up_option or []}
    started_s = monotonic()
    with tempfile.TemporaryDirectory() as scratch, Progress(*columns, console=Console(stderr=True)) as progress:
        directory = model or Path(scratch)
        if model is None:
            make_model(directory, Shape())
        for number in range(passes):
            for policy in chosen:
                bar = progress.add_task(f"{policy}, pass {number + 1}", total=conversations * turns)
                results.append(run_pass(policy, directory, talk, up, seed + number, partial(progress.advance, bar)))
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in results], indent=2))
    else:
        title = f"{conversations} conversations of {turns} turns, {prefill} prefill + {decode} decode workers"
        Console().print(table(results, f"{title}, {monotonic() - started_s:.0f} s"))
    raise typer.Exit(1 if any(one.failures for one in results) else 0)


if __name__ == "__main__":
    typer.run(main)
