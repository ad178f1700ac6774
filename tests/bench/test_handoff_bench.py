"""bench.handoff: its figures, its driver before a scripted decode worker, its slow link."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
import redis as redis_package
import typer

from baton.rpc import common_pb2, worker_pb2, worker_pb2_grpc
from bench.decode_calls import RequestFailed
from bench.handoff import disagreeing, parse_lengths, parts_table, ttft_table
from bench.handoff_cluster import Cluster
from bench.handoff_driver import driving, measure
from bench.handoff_figures import Row, Sample, Way
from bench.netns import NoNamespaces, slow_link
from bench.worker_processes import redis, secret_file


def sample(way: Way, ttft_s: float, token_id: int = 7, **parts: float) -> Sample:
    return Sample(way, 2000, token_id, ttft_s, **parts)  # type: ignore[arg-type]


# ---- figures


def test_what_is_not_hidden_is_exposed() -> None:
    assert sample("streamed", 1, transfer_s=0.2, exposed_s=0.05).hidden_share == 0.75
    assert sample("streamed", 1, transfer_s=0.2, exposed_s=0.3).hidden_share == 0
    assert sample("local", 1).hidden_share == 1


def test_the_rest_is_what_no_worker_accounts_for() -> None:
    parts = {"queue_s": 0.125, "prefill_queue_s": 0.125, "prefill_s": 0.25, "exposed_s": 0.25, "transfer_s": 9.0}
    assert sample("streamed", 1, **parts).rest_s == 0.25


def test_ways_are_compared_turn_by_turn() -> None:
    local, streamed = (1.0, 2.0, 8.0), (1.1, 2.2, 4.0)  # the machine was slow in the last turn, then not
    pairs = zip(local, streamed, strict=True)
    samples = [made for a, b in pairs for made in (sample("local", a), sample("streamed", b))]
    row = Row("shm", 2000, samples)
    assert row.ratio("streamed", "local", lambda s: s.ttft_s) == pytest.approx(1.1)
    assert row.ratio_of_best("streamed", "local", lambda s: s.ttft_s) == pytest.approx(1.1)
    assert row.ratio_of_best("streamed", "send_after", lambda s: s.ttft_s) is None
    assert row.middle("local", lambda s: s.ttft_s) == 2.0
    assert row.middle("send_after", lambda s: s.ttft_s) is None
    assert row.ratio("streamed", "send_after", lambda s: s.ttft_s) is None


def test_the_result_has_the_agreed_keys() -> None:
    elsewhere = [sample("streamed", 1.25, prefill_s=1.5), sample("send_after", 2.0, prefill_s=1.0)]
    row = Row("tcp", 2000, [sample("local", 1.0), *elsewhere])
    told = json.loads(json.dumps(row.as_json()))
    assert (told["link"], told["tokens"], told["hidden_share"]) == ("tcp", 2000, 1)
    assert (told["ttft_local_s"], told["ttft_streamed_s"], told["ttft_send_after_s"]) == (1.0, 1.25, 2.0)
    assert (told["streamed_over_local"], told["prefill_streamed_over_send_after"]) == (1.25, 1.5)
    assert ttft_table([row]).row_count == parts_table([row]).row_count == 1


def test_other_first_tokens_are_counted() -> None:
    right = [sample("local", 1, 7), sample("streamed", 1, 7)]
    wrong = [sample("local", 1, 8), sample("streamed", 1, 9)]
    assert disagreeing(Row("shm", 2000, right)) == 0
    assert disagreeing(Row("shm", 2000, [*right, *wrong])) == 1


def test_lengths_that_the_model_has_no_room_for() -> None:
    assert parse_lengths("128,2000") == [128, 2000]
    for text in ("", "0", "100000", "many"):
        with pytest.raises(typer.BadParameter):
            parse_lengths(text)


# ---- the driver


class ScriptedWorker(worker_pb2_grpc.DecodeWorkerServicer):
    """Answers at once, as whoever was asked to would."""

    def __init__(self, error: str = "") -> None:
        self.error, self.submits = error, list[worker_pb2.Submit]()

    async def Serve(self, requests: AsyncIterator[worker_pb2.ServeRequest], _: object) -> object:  # noqa: N802
        async for request in requests:
            self.submits.append(request.submit)
            timeline = common_pb2.Timeline(
                transport="shm" if request.submit.prefill_candidates else "",
                prefill_s=0.5,
                transfer_s=0.25,
                transfer_bytes=100,
            )
            output = worker_pb2.TokenOutput(token_ids=[5], timeline=timeline, error=self.error)
            yield worker_pb2.ServeResponse(outputs=[output])


@asynccontextmanager
async def served(worker: ScriptedWorker) -> AsyncIterator[Cluster]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_DecodeWorkerServicer_to_server(worker, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield Cluster({"streamed": "p:1", "after_prefill": "p:2"}, {"always": address}, "shm")
    finally:
        await server.stop(None)


def test_every_way_is_asked_and_no_prompt_is_in_a_cache() -> None:
    async def scenario() -> None:
        worker, advances = ScriptedWorker(), list[int]()
        async with served(worker) as cluster, driving(cluster, vocabulary=200, seed=1) as driver:
            rows = await measure(driver, "shm", [3, 5], 2, lambda: advances.append(1))
        assert [(row.tokens, [s.way for s in row.samples]) for row in rows] == [
            (3, ["local", "streamed", "send_after", "streamed", "send_after", "local"]),
            (5, ["local", "streamed", "send_after", "streamed", "send_after", "local"]),
        ]
        assert len(advances) == 6 and len(worker.submits) == 18
        assert len({submit.cache_salt for submit in worker.submits}) == 18
        for turn in (worker.submits[start : start + 3] for start in range(0, 18, 3)):
            assert len({tuple(submit.prompt) for submit in turn}) == 1
            assert sorted(c.address for submit in turn for c in submit.prefill_candidates) == ["p:1", "p:2"]
        streamed = rows[0].of("streamed")[0]
        assert (streamed.prefill_s, streamed.transfer_s, streamed.transfer_bytes) == (0.5, 0.25, 100)

    asyncio.run(scenario())


def test_another_transport_than_asked_for_ends_the_run() -> None:
    async def scenario() -> None:
        async with served(ScriptedWorker()) as shm, driving(replace(shm, transport="tcp"), 200, 1) as driver:
            with pytest.raises(RequestFailed, match=r"streamed, 3 tokens: it came by shm instead"):
                await measure(driver, "tcp", [3], 1, lambda: None)

    asyncio.run(scenario())


def test_a_request_that_fails_ends_the_run() -> None:
    async def scenario() -> None:
        async with served(ScriptedWorker("It broke.")) as cluster, driving(cluster, 200, 1) as driver:
            with pytest.raises(RequestFailed, match=r"local, 3 tokens: It broke\."):
                await measure(driver, "shm", [3], 1, lambda: None)

    asyncio.run(scenario())


# ---- surroundings


def test_the_redis_is_reached_by_its_socket_and_goes(tmp_path: Path) -> None:
    with redis(tmp_path) as url:
        client = redis_package.Redis.from_url(url)
        assert client.ping()
        client.close()
    with pytest.raises(redis_package.ConnectionError):
        redis_package.Redis.from_url(url).ping()


def test_the_secret_is_its_owners_alone(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600 and len(path.read_text()) == 64


def test_a_slow_link_is_there_and_goes() -> None:
    try:
        with slow_link(10**9) as link:
            name = link.inside[-1]
            assert link.near_host != link.far_host
            assert (Path("/run/netns") / name).exists()
    except NoNamespaces as error:
        pytest.skip(str(error))
    assert not (Path("/run/netns") / name).exists()


def test_without_the_tools_there_is_no_slow_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoNamespaces, match="iproute2"), slow_link(10**9):
        pass
