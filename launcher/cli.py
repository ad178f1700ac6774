"""The command line `baton`.

Every error of the world's is one sentence on stderr: exit 2 for a bad option or setting, 1 for all else.
What a command alone needs (torch, Ray, FastAPI) is imported inside it, so that help and mistakes are fast.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from baton.errors import BatonError, SettingsError
from baton.logs import set_up_logging
from baton.settings import DecodeWorkerSettings, PrefillWorkerSettings, RouterSettings, ServiceSettings, UpSettings
from launcher.checks import check_model, check_redis
from launcher.flags import takes_settings
from launcher.plan import BY_HAND_ONLY
from launcher.router_api import DEFAULT_URL

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger(__name__)

app = typer.Typer(
    help="Disaggregated LLM serving: prefill and decode apart, KV blocks streamed between them.",
    add_completion=False,
    rich_markup_mode=None,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead")]
Url = Annotated[str, typer.Option(help="Where the router's HTTP port is")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="BATON_API_KEY", help="Needed where the router knows tenants; others on this machine may see flags"
    ),
]
TABLE_COLUMNS_MIN = 100
"""Where the width of what is written to is not known."""


@app.command()
@takes_settings(UpSettings, aliases={"redis_url": "--redis"}, hidden=BY_HAND_ONLY)
def up(settings: UpSettings) -> None:
    """Run everything: Redis, workers and router. Ctrl-C drains and stops it."""
    from launcher.process import run_until_stopped
    from launcher.progress import Progress
    from launcher.up import Deployment

    set_up_logging("baton", settings.log_level)
    run_until_stopped(
        Deployment(settings, Progress()),
        lambda deployment: f"ready {deployment.router.addresses}",
        settings.drain_timeout_s,
    )


@app.command()
@takes_settings(RouterSettings)
def router(settings: RouterSettings) -> None:
    """Run a router: the HTTP and gRPC front door."""
    prepare("router", settings, {served.model for served in settings.served_models})
    from launcher.process import run_until_stopped
    from launcher.router_service import RouterService

    run_until_stopped(RouterService(settings), lambda router: f"ready {router.addresses}", settings.drain_timeout_s)


@app.command()
@takes_settings(PrefillWorkerSettings)
def prefill_worker(settings: PrefillWorkerSettings) -> None:
    """Run one prefill worker."""
    prepare("prefill-worker", settings, [settings.model])
    from launcher.process import run_until_stopped
    from prefill_worker.worker import PrefillWorker

    run_until_stopped(PrefillWorker(settings), lambda worker: f"ready grpc {worker.address}", settings.drain_timeout_s)


@app.command()
@takes_settings(DecodeWorkerSettings)
def decode_worker(settings: DecodeWorkerSettings) -> None:
    """Run one decode worker."""
    prepare("decode-worker", settings, [settings.model])
    from decode_worker.worker import DecodeWorker
    from launcher.process import run_until_stopped

    run_until_stopped(DecodeWorker(settings), lambda worker: f"ready grpc {worker.address}", settings.drain_timeout_s)


@app.command()
def status(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show the workers: role, model, pool, state, sequences and KV blocks."""
    from launcher.status import fetch_workers, render

    workers = fetch_workers(url, api_key)
    if as_json:
        typer.echo(json.dumps({"workers": workers}, indent=2))
    else:
        show(render(workers))


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="As in the answer's header x-baton-request-id")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show why a request was placed where it was, what else there was, and what became of it."""
    from launcher.explain import fetch_decision, render

    decision = fetch_decision(url, request_id, api_key)
    if as_json:
        typer.echo(json.dumps(decision, indent=2))
    else:
        show(render(decision))


cache = typer.Typer(help="Show what the workers' caches hold, tier by tier; or clear them.", rich_markup_mode=None)
app.add_typer(cache, name="cache")


@cache.callback(invoke_without_command=True)
def show_cache(
    context: typer.Context,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    top: Annotated[int, typer.Option(min=0, max=100, help="Prefixes to show, the most reused first")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show what the workers' caches hold, tier by tier; or clear them."""
    if context.invoked_subcommand is not None:
        return
    from launcher.cache import fetch_cache, render

    found = fetch_cache(url, top, api_key)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(render(found))


@cache.command("clear")
def clear_cache(
    context: typer.Context,
    tenant: Annotated[str | None, typer.Option(help="Clear this tenant's blocks alone; default: everybody's")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Have every worker forget cached KV. Exits with 1 if a worker could not be reached."""
    from launcher import cache as command

    if not yes:
        typer.confirm(command.question(tenant), abort=True, err=True)
    above = context.parent.params if context.parent else {}  # they may stand before `clear`, too
    url = url if url != DEFAULT_URL else above.get("url", url)
    cleared = command.clear_cache(url, tenant, api_key or above.get("api_key"))
    if as_json:
        typer.echo(json.dumps(cleared, indent=2))
    else:
        for sentence in command.cleared_sentences(cleared):
            show(sentence)
    if command.missed(cleared):
        raise typer.Exit(1)


@app.command()
def demo(as_json: AsJson = False) -> None:
    """Start everything, ask the bundled model about a long ledger, show a request's timeline, stop."""
    from launcher.demo import run_demo

    set_up_logging("baton", "warning")
    if not run_demo(as_json=as_json):
        raise typer.Exit(1)


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="Mooncake format: a JSON object a line")],
    profile: Annotated[str, typer.Option(help="What the workers are: a YAML file, or h100-8b or h100-70b")],
    prefill: Annotated[int, typer.Option(help="Prefill workers")] = 1,
    decode: Annotated[int, typer.Option(help="Decode workers")] = 1,
    rate: Annotated[float, typer.Option(help="How many times as fast as in the trace requests come")] = 1.0,
    policy: Annotated[str, typer.Option(help="Placement policies, with commas in between")] = "least-added-latency",
    seed: Annotated[int, typer.Option(help="The same seed gives the same result")] = 0,
    requests: Annotated[int | None, typer.Option(min=1, help="Replay the trace's first ones only")] = None,
    unique: Annotated[bool, typer.Option("--unique", help="Make every block unique: nothing is reused")] = False,
    slow: Annotated[str, typer.Option(help="Slow workers down, like decode-0=3,prefill-1=2")] = "",
    kv_blocks: Annotated[int | None, typer.Option(help="KV blocks of 512 tokens on each worker")] = None,
    ddr_bytes: Annotated[
        str, typer.Option(help="Host memory below each worker's HBM, like 64GiB; 0: there is none")
    ] = "0",
    ssd_bytes: Annotated[str, typer.Option(help="SSD below that, on each worker; needs host memory")] = "0",
    worker_queue: Annotated[
        float | None, typer.Option(help="Seconds; requests wait at the router while every worker's queue is longer")
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds; requests that no worker would begin with by then are refused")
    ] = None,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the times to first token into this PNG file")] = None,
) -> None:
    """Replay a trace through the real router and schedulers, on simulated workers, in virtual time."""
    from launcher.replay import (
        ReplayOptions,
        admission_of,
        parse_policies,
        parse_slowdown,
        render,
        run_replay,
        tiers_of,
    )

    options = ReplayOptions(
        trace,
        profile,
        prefill,
        decode,
        rate,
        parse_policies(policy),
        seed,
        requests,
        unique,
        parse_slowdown(slow),
        kv_blocks,
        admission_of(worker_queue, deadline),
        tiers_of(ddr_bytes, ssd_bytes),
    )
    reports, replayed = run_replay(options)
    if plot is not None:
        from simulator.plot import plot_reports

        title = f"{trace.name} at rate {rate:g} on {prefill} prefill and {decode} decode workers, {profile}"
        plot_reports(plot, reports, title)
    if as_json:
        figures = [report.as_json() for report in reports]
        typer.echo(json.dumps(figures[0] if len(figures) == 1 else figures, indent=2))
    else:
        show(render(reports, replayed))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(metadata.version("kvbaton"))


def show(what: "RenderableType") -> None:
    from rich.console import Console

    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, TABLE_COLUMNS_MIN)
    console.print(what)


def prepare(service: str, settings: ServiceSettings, models: Iterable[str]) -> None:
    """Before a service's heavy imports: logging, and whether its models and its Redis are there."""
    set_up_logging(service, settings.log_level)
    for model in models:
        check_model(model)
    asyncio.run(check_redis(settings.redis_url))


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code; what went wrong is on stderr."""
    try:
        return app(arguments or ["--help"], prog_name="baton", standalone_mode=False) or 0
    except TyperException as error:
        return fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return fail("stopped.", 130)
    except BatonError as error:
        log.debug("where it came from", exc_info=True)
        return fail(str(error), 2 if isinstance(error, SettingsError) else 1)
    except Exception as error:  # a bug: told in one line as well
        log.debug("where it came from", exc_info=True)
        return fail(f"An internal error ended baton: {error!r}; --log-level debug shows where.", 1)


def fail(sentence: str, code: int) -> int:
    print("error:", " ".join(sentence.split()), file=sys.stderr)
    return code
