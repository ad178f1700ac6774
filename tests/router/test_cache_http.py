"""The cache as operators see it by HTTP and by the command line, and clearing it."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_worker import FakeDecodeWorker, is_silent
from router_rig import running

from baton.cluster.redis_server import EmbeddedRedis
from baton.rpc import events_pb2, worker_pb2
from launcher.cli import run

KEYS = {"acme": "sk-acme-0123456789abcdef", "beta": "sk-beta-0123456789abcdef", "ops": "sk-ops-0123456789abcdef"}
HOT, WARM = bytes(range(16)), bytes(range(16, 32))


def tier(kind: "events_pb2.Tier", **fields: Any) -> worker_pb2.TierStatus:
    defaults: dict[str, Any] = {"blocks": 10, "blocks_max": 40, "bytes": 10 * 2**20, "bytes_max": 40 * 2**20}
    return worker_pb2.TierStatus(tier=kind, **defaults | fields)


def a_worker(name: str, prefixes: list[tuple[bytes, int, int, "events_pb2.Tier"]]) -> FakeDecodeWorker:
    worker = FakeDecodeWorker(is_silent, name)
    worker.cache_status = worker_pb2.CacheStatus(
        worker_id=name,
        tiers=[tier(events_pb2.TIER_HBM, hit_tokens=300), tier(events_pb2.TIER_DDR, hit_tokens=100)],
        queried_tokens=1000,
        fetched_tokens=50,
        top_prefixes=[
            worker_pb2.PrefixStatus(block_hash=name, tokens=tokens, uses=uses, tier=kind)
            for name, tokens, uses, kind in prefixes
        ],
    )
    return worker


def two_workers() -> list[FakeDecodeWorker]:
    return [
        a_worker("decode-1", [(HOT, 512, 7, events_pb2.TIER_DDR), (WARM, 64, 5, events_pb2.TIER_HBM)]),
        a_worker("decode-2", [(HOT, 512, 2, events_pb2.TIER_HBM)]),
    ]


def test_the_tiers_of_all_workers_and_the_clusters_sums_are_told(model_directory: Path) -> None:
    async def main() -> None:
        workers = two_workers()
        async with running(model_directory, *workers) as rig:
            told = (await rig.http.get("/v1/cache?top=2")).json()
            assert [worker["worker_id"] for worker in told["workers"]] == ["decode-1", "decode-2"]
            first = told["workers"][0]
            assert first["reachable"] and first["queried_tokens"] == 1000
            assert [each["tier"] for each in first["tiers"]] == ["hbm", "ddr"]
            assert first["tiers"][1]["hit_tokens"] == 100 and first["tiers"][1]["off_reason"] == ""
            assert told["queried_tokens"] == 2000
            assert told["hit_rates"] == {"hbm": 0.3, "ddr": 0.1, "ssd": 0.0, "peer": 0.05}
            assert told["top_prefixes"] == [
                {"hash": HOT.hex(), "tokens": 512, "uses": 9, "tier": "hbm", "workers": ["decode-1", "decode-2"]},
                {"hash": WARM.hex(), "tokens": 64, "uses": 5, "tier": "hbm", "workers": ["decode-1"]},
            ]
            assert workers[0].top_prefixes_asked == [2]
            assert len((await rig.http.get("/v1/cache?top=1")).json()["top_prefixes"]) == 1
            bad = await rig.http.get("/v1/cache?top=1000")
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, "top")

    asyncio.run(main())


def test_a_worker_that_does_not_answer_is_named(model_directory: Path) -> None:
    async def main() -> None:
        workers = [*two_workers(), FakeDecodeWorker(is_silent, "old")]
        workers[2].cache_status = None
        async with running(model_directory, *workers) as rig:
            await workers[1].stop()
            told = (await rig.http.get("/v1/cache")).json()
            errors = {worker["worker_id"]: worker["error"] for worker in told["workers"]}
            assert errors["decode-1"] is None
            assert errors["decode-2"] == "GetCacheStatus failed: UNAVAILABLE"
            assert errors["old"] == "GetCacheStatus failed: UNIMPLEMENTED"
            assert told["queried_tokens"] == 1000
            cleared = (await rig.http.post("/v1/cache/clear", json={})).json()
            assert (cleared["blocks"], cleared["bytes"]) == (20, 20 * 2**20)
            assert [worker["reachable"] for worker in cleared["workers"]] == [True, False, True]

    asyncio.run(main())


def test_an_open_router_clears_for_anybody(model_directory: Path) -> None:
    async def main() -> None:
        workers = two_workers()
        async with running(model_directory, *workers) as rig:
            assert (await rig.http.post("/v1/cache/clear", json={"tenant": "acme"})).json()["tenant"] == "acme"
            assert (await rig.http.post("/v1/cache/clear")).json()["tenant"] is None
            assert [worker.cleared for worker in workers] == [["acme", ""]] * 2
            for body in ({"tenants": "acme"}, {"tenant": 1}, {"tenant": ""}, {"tenant": "x" * 64}, []):
                bad = await rig.http.post("/v1/cache/clear", json=body)
                assert (bad.status_code, bad.json()["error"]["param"]) == (400, "tenant")
            assert (await rig.http.get("/v1/cache/clear")).status_code == 405
            assert [worker.cleared for worker in workers] == [["acme", ""]] * 2

    asyncio.run(main())


def tenants_file(directory: Path) -> Path:
    tenants = [
        {"name": name, "api_keys_sha256": [hashlib.sha256(key.encode()).hexdigest()], "operator": name == "ops"}
        for name, key in KEYS.items()
    ]
    file = directory / "tenants.yaml"
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    return file


def test_a_tenant_clears_its_own_alone_and_sees_no_prefixes(
    model_directory: Path, tmp_path: Path, redis_server: EmbeddedRedis, key_prefix: str
) -> None:
    async def main() -> None:
        workers = two_workers()
        settings: dict[str, Any] = {"tenants_file": tenants_file(tmp_path), "key_prefix": key_prefix}
        async with running(model_directory, *workers, redis_url=redis_server.url, **settings) as rig:

            async def clear(key: str, **body: str) -> int:
                headers = {"authorization": f"Bearer {KEYS[key]}"} if key else {}
                return (await rig.http.post("/v1/cache/clear", json=body, headers=headers)).status_code

            async def look(key: str) -> dict[str, Any]:
                told = await rig.http.get("/v1/cache", headers={"authorization": f"Bearer {KEYS[key]}"})
                return dict(told.json())

            assert await clear("") == 401 and (await rig.http.get("/v1/cache")).status_code == 401
            assert await clear("acme") == 400, "not everybody's"
            assert await clear("acme", tenant="beta") == 400
            assert [worker.cleared for worker in workers] == [[], []]
            assert await clear("acme", tenant="acme") == 200
            assert await clear("ops", tenant="beta") == await clear("ops") == 200
            assert [worker.cleared for worker in workers] == [["acme", "beta", ""]] * 2
            assert (await look("acme"))["top_prefixes"] == [] and (await look("acme"))["queried_tokens"] == 2000
            assert set(workers[0].top_prefixes_asked) == {0}
            assert len((await look("ops"))["top_prefixes"]) == 2

    asyncio.run(main())


def test_the_command_shows_and_clears_a_real_routers_cache(
    model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        workers = two_workers()
        async with running(model_directory, *workers) as rig:
            assert await asyncio.to_thread(run, ["cache", "--url", rig.url]) == 0
            shown = capsys.readouterr().out
            assert "decode-1" in shown and HOT.hex()[:12] in shown and "30.0% HBM" in shown
            assert await asyncio.to_thread(run, ["cache", "--url", rig.url, "--json", "--top", "1"]) == 0
            assert len(json.loads(capsys.readouterr().out)["top_prefixes"]) == 1
            clear = ["cache", "clear", "--yes", "--url", rig.url]
            assert await asyncio.to_thread(run, [*clear, "--tenant", "acme"]) == 0
            assert "Freed 20 blocks, 20.0 MiB, on 2 workers." in capsys.readouterr().out
            await workers[1].stop()
            assert await asyncio.to_thread(run, clear) == 1
            assert "decode-2 was not cleared: ClearCache failed: UNAVAILABLE." in capsys.readouterr().out
            assert workers[0].cleared == ["acme", ""]

    asyncio.run(main())
