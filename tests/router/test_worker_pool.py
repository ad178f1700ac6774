import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from fake_worker import LENGTH, STOP, FakeDecodeWorker, failure, is_silent, output, says
from router_rig import ListedMembership, running

from baton.ids import RequestId
from baton.rpc import common_pb2, worker_pb2
from router.worker_pool import WorkerLost, WorkerPool

ONE_TOKEN = says([output(5, finish=LENGTH)])


async def starts_then_hangs(submit: worker_pb2.Submit) -> Any:
    del submit
    yield output(5)
    await asyncio.Event().wait()


def test_a_worker_lost_before_the_first_token_is_replaced_by_another(model_directory: Path) -> None:
    async def main() -> None:
        first, second = FakeDecodeWorker(is_silent, "decode-1"), FakeDecodeWorker(ONE_TOKEN, "decode-2")
        async with running(model_directory, first) as rig, second:
            asking = asyncio.create_task(rig.complete(return_token_ids=True))
            await first.until(lambda worker: bool(worker.submits))
            rig.membership.change([first.info, second.info])
            async with asyncio.timeout(5):
                while len(rig.router._pool.usable()) < 2:
                    await rig.router._pool.changed()
            await first.stop()
            response = await asking
            assert response.json()["choices"][0]["token_ids"] == [5]
            assert second.submits[0].sampling == first.submits[0].sampling, "the same seed: the same tokens"
            assert rig.metric("baton_placement_retries_total", model="m") == 1
            await first.start()

    asyncio.run(main())


def test_a_worker_lost_with_nobody_else_is_said_by_name(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(is_silent)
        async with running(model_directory, worker) as rig:
            asking = asyncio.create_task(rig.complete())
            await worker.until(lambda worker: bool(worker.submits))
            await worker.stop()
            response = await asking
            assert response.status_code == 503
            message = "The decode worker decode-1 was lost while it served this request; send it again."
            assert response.json()["error"]["message"] == message
            await worker.start()

    asyncio.run(main())


def test_a_worker_lost_amid_a_stream_ends_it_with_an_error(model_directory: Path) -> None:
    async def main() -> None:
        worker, other = FakeDecodeWorker(starts_then_hangs), FakeDecodeWorker(is_silent, "decode-2")
        async with running(model_directory, worker) as rig, other:
            body = {"model": "m", "prompt": "a", "stream": True}
            async with rig.http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                rig.membership.change([worker.info, other.info])
                await worker.stop()
                rest = "".join([line async for line in lines])
            assert "decode-1 was lost" in rest and "[DONE]" not in rest
            assert not other.submits, "it had begun, so it is not begun again"
            await worker.start()

    asyncio.run(main())


def test_a_lost_worker_is_used_again_when_it_is_back(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(ONE_TOKEN)
        async with running(model_directory, worker) as rig:
            await worker.stop()
            async with asyncio.timeout(5):
                while rig.router.is_ready:
                    await rig.router._pool.changed()
            assert (await rig.complete()).status_code == 503
            await worker.start()
            async with asyncio.timeout(5):
                await rig.router.ready()
            assert (await rig.complete()).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("kind", [worker_pb2.ERROR_KIND_OVERLOADED, worker_pb2.ERROR_KIND_UNAVAILABLE])
def test_a_worker_that_refuses_is_replaced_by_another(model_directory: Path, kind: int) -> None:
    async def main() -> None:
        refusing, willing = FakeDecodeWorker(says([failure(kind)])), FakeDecodeWorker(ONE_TOKEN, "decode-2")
        async with running(model_directory, refusing, willing) as rig:
            async with asyncio.timeout(5):
                while len(rig.router._pool.usable()) < 2:
                    await rig.router._pool.changed()
            assert (await rig.complete()).status_code == 200
            assert (len(refusing.submits), len(willing.submits)) == (1, 1)

    asyncio.run(main())


def test_tries_are_bounded(model_directory: Path) -> None:
    async def main() -> None:
        refusal = says([failure(worker_pb2.ERROR_KIND_OVERLOADED)])
        workers = [FakeDecodeWorker(refusal, f"decode-{number}") for number in range(2)]
        async with running(model_directory, *workers) as rig:
            async with asyncio.timeout(5):
                while len(rig.router._pool.usable()) < 2:
                    await rig.router._pool.changed()
            assert (await rig.complete()).status_code == 429
            assert sum(len(worker.submits) for worker in workers) == 3

    asyncio.run(main())


def test_a_workers_cancellation_is_not_an_ending(model_directory: Path) -> None:
    async def main() -> None:
        given_up = output(finish=common_pb2.FINISH_REASON_CANCELLED)
        async with running(model_directory, FakeDecodeWorker(says([output(5), given_up]))) as rig:
            assert (await rig.complete()).status_code == 503

    asyncio.run(main())


def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has(model_directory: Path) -> None:
    release = asyncio.Event()

    async def script(submit: worker_pb2.Submit) -> Any:
        del submit
        await release.wait()
        yield output(0, finish=STOP)

    async def main() -> None:
        worker = FakeDecodeWorker(script)
        async with running(model_directory, worker) as rig:
            asking = asyncio.create_task(rig.complete())
            await worker.until(lambda worker: bool(worker.submits))
            worker.state = "draining"
            rig.membership.change([worker.info])
            assert (await rig.complete()).status_code == 503
            rig.membership.change([])
            release.set()
            assert (await asking).status_code == 200

    asyncio.run(main())


async def pool_of(*workers: FakeDecodeWorker, delays_s: tuple[float, ...] = (0.01,)) -> WorkerPool:
    pool = WorkerPool(ListedMembership([worker.info for worker in workers]), "m", delays_s)
    await pool.start()
    async with asyncio.timeout(5):
        while len(pool.usable()) < len(workers):
            await pool.changed()
    return pool


def test_all_requests_to_a_worker_share_one_stream(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(ONE_TOKEN)
        async with running(model_directory, worker) as rig:
            await asyncio.gather(*(rig.complete() for _ in range(10)))
            assert (len(worker.submits), worker.streams) == (10, 1)

    asyncio.run(main())


def test_a_worker_that_left_keeps_its_stream_until_its_last_request_ends() -> None:
    async def main() -> None:
        async with FakeDecodeWorker(starts_then_hangs) as worker:
            membership = ListedMembership([worker.info])
            pool = WorkerPool(membership, "m")
            await pool.start()
            async with asyncio.timeout(5):
                while not pool.is_ready:
                    await pool.changed()
            outputs: asyncio.Queue[worker_pb2.TokenOutput | WorkerLost] = asyncio.Queue()
            pool.submit(worker.info, worker_pb2.Submit(request_id="r"), outputs.put_nowait)
            membership.change([])
            first = await outputs.get()
            assert isinstance(first, worker_pb2.TokenOutput) and list(first.token_ids) == [5]
            assert not pool.usable()
            pool.cancel(worker.info, RequestId("r"))
            async with asyncio.timeout(5):
                while pool._links:
                    await pool.changed()
            await pool.stop()

    asyncio.run(main())


def test_reconnecting_is_not_a_spin(caplog: pytest.LogCaptureFixture) -> None:
    """One delay is a promise that never resolves in this test: so there is one failed attempt and no more."""

    async def main() -> None:
        worker = FakeDecodeWorker(ONE_TOKEN)
        async with worker:
            pool = await pool_of(worker, delays_s=(3600,))
        async with asyncio.timeout(5):
            while pool.is_ready:
                await pool.changed()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.changed(), 0.3)
        await pool.stop()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert len([record for record in caplog.records if "stream to decode worker" in record.message]) == 1


def test_stopping_the_pool_tells_whoever_waits() -> None:
    async def main() -> None:
        async with FakeDecodeWorker(is_silent) as worker:
            pool = await pool_of(worker)
            outputs: list[worker_pb2.TokenOutput | WorkerLost] = []
            pool.submit(worker.info, worker_pb2.Submit(request_id="r"), outputs.append)
            await worker.until(lambda worker: bool(worker.submits))
            await pool.stop()
            assert [type(each) for each in outputs] == [WorkerLost]
            await pool.stop()

    asyncio.run(main())
