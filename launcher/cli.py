"""The command line `baton`.

Every error of the world's is one sentence on stderr: exit 2 for a bad option or setting, 1 for all else.
What a command alone needs (torch, Ray, FastAPI) is imported inside it, so that help and mistakes are fast.
"""

import asyncio
import json
import logging
import sys
from importlib import metadata
from typing import Annotated

import typer
from typer.exceptions import TyperException

from baton.errors import BatonError, SettingsError
from baton.logs import set_up_logging
from baton.settings import DecodeWorkerSettings, PrefillWorkerSettings, RouterSettings, ServiceSettings, UpSettings
from launcher.checks import check_model, check_redis
from launcher.flags import takes_settings
from launcher.plan import BY_HAND_ONLY

log = logging.getLogger(__name__)

app = typer.Typer(
    help="Disaggregated LLM serving: prefill and decode apart, KV blocks streamed between them.",
    add_completion=False,
    rich_markup_mode=None,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead")]


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
    prepare("router", settings)
    from launcher.process import run_until_stopped
    from launcher.router_service import RouterService

    run_until_stopped(RouterService(settings), lambda router: f"ready {router.addresses}", settings.drain_timeout_s)


@app.command()
@takes_settings(PrefillWorkerSettings)
def prefill_worker(settings: PrefillWorkerSettings) -> None:
    """Run one prefill worker."""
    prepare("prefill-worker", settings)
    from launcher.process import run_until_stopped
    from prefill_worker.worker import PrefillWorker

    run_until_stopped(PrefillWorker(settings), lambda worker: f"ready grpc {worker.address}", settings.drain_timeout_s)


@app.command()
@takes_settings(DecodeWorkerSettings)
def decode_worker(settings: DecodeWorkerSettings) -> None:
    """Run one decode worker."""
    prepare("decode-worker", settings)
    from decode_worker.worker import DecodeWorker
    from launcher.process import run_until_stopped

    run_until_stopped(DecodeWorker(settings), lambda worker: f"ready grpc {worker.address}", settings.drain_timeout_s)


@app.command()
def status(
    url: Annotated[str, typer.Option(help="Where the router's HTTP port is")] = "http://127.0.0.1:8000",
    as_json: AsJson = False,
) -> None:
    """Show the workers: role, model, state, sequences and KV blocks."""
    from rich.console import Console

    from launcher.status import fetch_workers, render

    workers = fetch_workers(url)
    if as_json:
        typer.echo(json.dumps({"workers": workers}, indent=2))
    else:
        Console().print(render(workers))


@app.command()
def demo(as_json: AsJson = False) -> None:
    """Start everything, ask the bundled model about a long ledger, show a request's timeline, stop."""
    from launcher.demo import run_demo

    set_up_logging("baton", "warning")
    if not run_demo(as_json=as_json):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(metadata.version("kvbaton"))


def prepare(service: str, settings: ServiceSettings) -> None:
    """Before a service's heavy imports: logging, and whether its model and its Redis are there."""
    set_up_logging(service, settings.log_level)
    check_model(settings.model)
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
