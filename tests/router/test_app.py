import asyncio
import signal
import socket
from pathlib import Path

import pytest
from fake_worker import FakeDecodeWorker, is_silent
from router_rig import ListedMembership, running

from baton.errors import SettingsError
from baton.settings import RouterSettings
from router.app import Router
from router.http.server import listen


def test_taken_ports_and_missing_tokenizers_are_clear_errors(model_directory: Path, tmp_path: Path) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for ports, flag in (({"http_port": port}, "--http-port"), ({"grpc_port": port}, "--grpc-port")):
                settings = RouterSettings(model="m", **{"http_port": 0, **ports})
                router = Router(settings, ListedMembership([]), {"m": model_directory})
                with pytest.raises(SettingsError, match=rf"{port}.*{flag}"):
                    await router.start()
                await router.stop()
        with pytest.raises(SettingsError, match="tokenizer"):
            Router(RouterSettings(model="m"), ListedMembership([]), {"m": tmp_path})

    asyncio.run(main())


def test_signals_stay_the_processes_own(model_directory: Path) -> None:
    async def main() -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        async with running(model_directory, wait=False) as rig:
            assert (await rig.http.get("/metrics")).status_code == 200
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    asyncio.run(main())


def test_stop_ends_what_still_runs_with_an_error_and_may_be_repeated(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(is_silent)
        async with running(model_directory, worker) as rig:
            asking = asyncio.create_task(rig.complete())
            await worker.until(lambda worker: bool(worker.submits))
            await rig.router.drain()
            await rig.router.stop()
            assert (await asking).status_code == 503
            await rig.router.stop()

    asyncio.run(main())


def test_responses_do_not_wait_for_acknowledgements() -> None:
    """asyncio sets TCP_NODELAY only on sockets whose protocol is named."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
