import json
from collections.abc import Iterator
from typing import Any

import pytest
from canned_router import Canned, serving
from rich.console import Console

from baton.errors import InvalidRequest, Unavailable
from launcher.cache import clear_cache, cleared_sentences, fetch_cache, question, render, size, used
from launcher.cli import run

COLUMNS = 100


@pytest.fixture
def router() -> Iterator[Canned]:
    with serving() as server:
        yield server


def tier(name: str, **fields: Any) -> dict[str, Any]:
    numbers = {"blocks": 1000, "blocks_max": 4096, "bytes": 2**30, "bytes_max": 4 * 2**30, "hit_tokens": 250}
    more = {"retained_bytes": 0, "off_reason": "", "restore_latency_s": 0.0, "restore_bytes_per_s": 0.0}
    return {"tier": name, **numbers, **more, **fields}


def worker(name: str, *tiers: dict[str, Any], **fields: Any) -> dict[str, Any]:
    known = {"worker_id": name, "role": "decode", "model": "m", "reachable": True, "error": None}
    return {**known, "queried_tokens": 1000, "tiers": list(tiers), **fields}


def cache(*workers: dict[str, Any], **fields: Any) -> dict[str, Any]:
    counts = {"queried_tokens": 2000, "fetched_tokens": 10, "dropped_blocks": 0, "corrupt_blocks": 0}
    rates = {"hbm": 0.5, "ddr": 0.25, "ssd": 0.125, "peer": 0.005}
    return {"workers": list(workers), **counts, "hit_rates": rates, "top_prefixes": [], **fields}


def text(told: dict[str, Any]) -> str:
    console = Console(width=COLUMNS)
    with console.capture() as captured:
        console.print(render(told))
    shown = captured.get()
    assert all(len(line) <= COLUMNS for line in shown.splitlines())
    return shown


def test_each_tier_of_each_worker_has_a_row() -> None:
    ddr = tier("ddr", retained_bytes=300 * 2**20, restore_bytes_per_s=9.5e9)
    shown = text(cache(worker("decode-0", tier("hbm"), ddr), worker("prefill-0", tier("hbm"), role="prefill")))
    lines = [line.split() for line in shown.splitlines()]
    assert lines[1][0] == "prefill-0", "prefill workers first"
    assert lines[2][:3] == ["decode-0", "HBM", "1,000"]
    assert " ".join(lines[3]) == "DDR 1,000 ██░░░░░░ 1.0 GiB of 4.0 GiB 250 25.0% 300 MiB 8.8 GiB/s"
    assert "Of 2,000 prompt tokens looked up: 50.0% HBM, 25.0% DDR, 12.5% SSD, 0.5% fetched." in shown


def test_a_tier_that_is_off_says_why() -> None:
    shown = text(cache(worker("d", tier("ssd", off_reason="the disk is full"))))
    assert shown.splitlines()[1].split()[-1] == "off"
    assert "SSD of d is off: the disk is full" in shown


def test_long_names_stay_within_the_columns() -> None:
    name = "baton-llama-70b-decode-7c9f5d6b8f-x2x4z"
    full = tier("ddr", blocks=10**7, bytes=900 * 2**30, hit_tokens=10**9, retained_bytes=2**39, restore_bytes_per_s=3e9)
    assert "900 GiB" in text(cache(worker(name, full, queried_tokens=10**9)))


def test_workers_without_tiers_or_an_answer_are_told_apart() -> None:
    shown = text(cache(worker("d0", reachable=False, error="x"), worker("d1")))
    assert "unreachable" in shown.splitlines()[1] and "keeps nothing" in shown.splitlines()[2]


def test_prefixes_are_short_hashes() -> None:
    prefix = {"hash": "0123456789abcdef" * 2, "tokens": 4096, "uses": 77, "tier": "ddr", "workers": ["a", "b"]}
    shown = text(cache(worker("d", tier("hbm")), top_prefixes=[prefix]))
    assert shown.splitlines()[-1].split() == ["0123456789ab", "DDR", "4,096", "77", "2"]


def test_what_went_wrong_is_a_sentence() -> None:
    shown = text(cache(worker("d", tier("hbm")), corrupt_blocks=3, dropped_blocks=1200))
    assert "3 blocks did not match their digests" in shown and "1,200 blocks were given up for want of room." in shown
    assert "blocks" not in text(cache(worker("d", tier("hbm")))).split("\n", 1)[1]


def test_nothing_to_show_is_a_sentence() -> None:
    assert "no worker has announced itself" in text(cache())
    assert "No prompt has been looked up yet." in text(cache(worker("d", tier("hbm")), queried_tokens=0))


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 KiB"), (2**30, "1.0 GiB"), (250 * 2**20, "250 MiB"), (2**50, "1024 TiB")],
)
def test_sizes_have_three_digits_or_so(count: int, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("part", "bar"),
    [(0, "░░░░░░░░"), (1, "█░░░░░░░"), (2**30, "██░░░░░░"), (4 * 2**30, "████████"), (2**40, "████████")],
)
def test_a_bar_is_as_long_as_the_tier_is_full(part: int, bar: str) -> None:
    assert used(tier("hbm", bytes=part)).plain.split()[0] == bar


CLEARED = {
    "object": "cache.clear",
    "tenant": None,
    "blocks": 1500,
    "bytes": 3 * 2**30,
    "workers": [
        {"worker_id": "a", "reachable": True, "error": None, "blocks": 1500, "bytes": 3 * 2**30},
        {"worker_id": "b", "reachable": False, "error": "ClearCache failed: UNAVAILABLE", "blocks": 0, "bytes": 0},
    ],
}


def test_what_was_freed_is_told_and_what_was_not() -> None:
    first, second = (sentence.plain for sentence in cleared_sentences(CLEARED))
    assert first == "Freed 1,500 blocks, 3.0 GiB, on 1 workers."
    assert second == "b was not cleared: ClearCache failed: UNAVAILABLE."


def test_clearing_posts_whose_cache_it_is(router: Canned) -> None:
    router.body = json.dumps(CLEARED).encode()
    assert clear_cache(router.url, "acme", "sk-1") == CLEARED
    clear_cache(router.url, None)
    assert router.posts == [("/v1/cache/clear", {"tenant": "acme"}), ("/v1/cache/clear", {})]
    assert router.authorizations == ["Bearer sk-1", None]


def test_clearing_asks_first(
    router: Canned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    router.body = json.dumps({**CLEARED, "workers": CLEARED["workers"][:1]}).encode()
    for answer, code, asked in (("n\n", 130, 0), ("", 130, 0), ("y\n", 0, 1)):
        monkeypatch.setattr("sys.stdin", open_text(answer))
        assert run(["cache", "clear", "--tenant", "acme", "--url", router.url]) == code
        assert len(router.posts) == asked
        assert "all KV of the tenant acme on every worker" in " ".join(capsys.readouterr().err.split())
    assert "everybody" in question(None)


def open_text(answer: str) -> Any:
    from io import BytesIO, TextIOWrapper

    return TextIOWrapper(BytesIO(answer.encode()))


def test_the_routers_url_may_stand_before_the_subcommand(router: Canned) -> None:
    router.body = json.dumps({**CLEARED, "workers": CLEARED["workers"][:1]}).encode()
    assert run(["cache", "--url", router.url, "--api-key", "sk-2", "clear", "--yes"]) == 0
    assert router.authorizations == ["Bearer sk-2"]


def test_the_cache_comes_from_the_router(router: Canned) -> None:
    router.body = json.dumps(cache()).encode()
    assert fetch_cache(router.url, 7) == cache()
    assert router.paths == ["/v1/cache?top=7"]
    router.body = b"{}"
    for ask in (lambda: fetch_cache(router.url, 1), lambda: clear_cache(router.url, None)):
        with pytest.raises(Unavailable, match="not as a Baton router does"):
            ask()
    router.status, router.body = 400, b'{"error": {"message": "name it, acme"}}'
    with pytest.raises(InvalidRequest, match="name it, acme"):
        clear_cache(router.url, None)
