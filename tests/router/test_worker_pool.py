import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from fake_worker import LENGTH, STOP, FakeDecodeWorker, failure, is_silent, output, says, speaks
from listed_membership import ListedMembership
from router_rig import Rig, running

from baton.ids import RequestId
from baton.rpc import common_pb2, worker_pb2
from router.worker_pool import Event, WorkerLost, WorkerPool


async def until_usable(rig: Rig, count: int) -> None:
    pool = rig.router._cluster.pool
    async with asyncio.timeout(30):
        while len(pool.usable("m")) != count:
            await pool.changed()


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
            await until_usable(rig, 2)
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


def test_a_worker_lost_amid_a_stream_with_nobody_else_ends_it_with_an_error(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(starts_then_hangs)
        async with running(model_directory, worker) as rig:
            body = {"model": "m", "prompt": "a", "stream": True}
            async with rig.http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                await worker.stop()
                rest = "".join([line async for line in lines])
            assert "decode-1 was lost" in rest and "[DONE]" not in rest
            await worker.start()

    asyncio.run(main())


def test_a_worker_lost_amid_a_stream_is_no_more_than_a_pause(model_directory: Path) -> None:
    async def text(rig: Rig, worker: FakeDecodeWorker | None = None) -> str:
        body = {"model": "m", "prompt": "a", "stream": True, "seed": 1, "max_tokens": 9}
        async with rig.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            read = [await anext(lines)]
            if worker is not None:
                await until_usable(rig, 2)
                await worker.stop()
            read += [line async for line in lines]
        events = [line.removeprefix("data: ") for line in read if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])

    async def starts_to_speak(submit: worker_pb2.Submit) -> Any:
        async for each in speaks(submit):
            yield each
            await asyncio.Event().wait()

    async def main() -> None:
        worker, other = FakeDecodeWorker(starts_to_speak), FakeDecodeWorker(speaks, "decode-2")
        async with running(model_directory, other) as rig:
            undisturbed = await text(rig)
        async with running(model_directory, worker) as rig, other:
            asking = asyncio.create_task(text(rig, worker))
            await worker.until(lambda worker: bool(worker.submits))
            rig.membership.change([worker.info, other.info])
            assert await asking == undisturbed
            assert len(other.submits[-1].generated) == 1
            await worker.start()

    asyncio.run(main())


def test_a_lost_worker_is_used_again_when_it_is_back(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(ONE_TOKEN)
        async with running(model_directory, worker) as rig:
            await worker.stop()
            await until_usable(rig, 0)
            assert (await rig.complete()).status_code == 503
            await worker.start()
            async with asyncio.timeout(30):
                await rig.router.ready()
            assert (await rig.complete()).status_code == 200

    asyncio.run(main())


def test_a_worker_that_refuses_is_replaced_by_another(model_directory: Path) -> None:
    async def main() -> None:
        refusal = says([failure(worker_pb2.ERROR_KIND_UNAVAILABLE)])
        refusing, willing = FakeDecodeWorker(refusal), FakeDecodeWorker(ONE_TOKEN, "decode-2")
        async with running(model_directory, refusing, failover_wait_s=5) as rig, willing:
            asking = asyncio.create_task(rig.complete())
            await refusing.until(lambda worker: bool(worker.submits))
            rig.membership.change([refusing.info, willing.info])
            assert (await asking).status_code == 200
            assert (len(refusing.submits), len(willing.submits)) == (1, 1)

    asyncio.run(main())


def test_tries_are_bounded(model_directory: Path) -> None:
    async def main() -> None:
        refusal = says([failure(worker_pb2.ERROR_KIND_OVERLOADED)])
        workers = [FakeDecodeWorker(refusal, f"decode-{number}") for number in range(2)]
        async with running(model_directory, *workers, failover_max=2) as rig:
            await until_usable(rig, 2)
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
    pool = WorkerPool(ListedMembership([worker.info for worker in workers]), reconnect_delays_s=delays_s)
    await pool.start()
    async with asyncio.timeout(30):
        while len(pool.usable("m")) < len(workers):
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
            pool = WorkerPool(membership)
            await pool.start()
            async with asyncio.timeout(30):
                while not pool.is_ready("m"):
                    await pool.changed()
            outputs: asyncio.Queue[Event] = asyncio.Queue()
            pool.submit(worker.info, worker_pb2.Submit(request_id="r"), lambda event, _: outputs.put_nowait(event))
            membership.change([])
            first = await outputs.get()
            assert isinstance(first, worker_pb2.TokenOutput) and list(first.token_ids) == [5]
            assert not pool.usable("m")
            pool.cancel(worker.info, RequestId("r"))
            async with asyncio.timeout(30):
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
        async with asyncio.timeout(30):
            while pool.is_ready("m"):
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
            outputs: list[Event] = []
            pool.submit(worker.info, worker_pb2.Submit(request_id="r"), lambda event, _: outputs.append(event))
            await worker.until(lambda worker: bool(worker.submits))
            await pool.stop()
            assert [type(each) for each in outputs] == [WorkerLost]
            await pool.stop()

    asyncio.run(main())
