import json
from collections.abc import Iterator
from typing import Any

import pytest
from canned_router import Canned, serving
from rich.console import Console

from baton.errors import InvalidRequest, Unavailable
from baton.rpc import inference_pb2
from launcher.cli import run
from launcher.explain import fetch_decision, milliseconds, render
from router.http.operator import as_json

COLUMNS = 100


@pytest.fixture
def router() -> Iterator[Canned]:
    with serving() as server:
        yield server


def candidate(decode: str, prefill: str = "", **terms: Any) -> inference_pb2.Candidate:
    waits = sum(terms.get(name, 0) for name in ("queue_s", "restore_s", "prefill_s", "transfer_s", "admission_s"))
    total_s = sum(value for name, value in terms.items() if name.endswith("_s") and name != "itl_s")
    fields = {"pool": "h100", "ttft_s": waits, "total_s": total_s, "itl_s": 0.008, **terms}
    return inference_pb2.Candidate(decode_worker=decode, prefill_worker=prefill, **fields)


CHOSEN = candidate("decode-1", "prefill-0", queue_s=0.0031, prefill_s=0.4212, transfer_s=0.0004, cached_tokens_hbm=4096)
OTHERS = [
    candidate("decode-0", "prefill-0", queue_s=0.0031, prefill_s=0.4212, others_decode_s=0.03),
    candidate("decode-0", prefill_s=0.9, others_decode_s=1.25),
]


def placement(**fields: Any) -> inference_pb2.PlacementDecision:
    defaults: dict[str, Any] = {
        "attempt": 1,
        "policy": "least-added-latency",
        "decided_at": 1_700_000_000.0,
        "decided_in_s": 0.00012,
        "router": "router-1",
        "prompt_tokens": 12_035,
        "candidates_considered": 6,
        "candidates": [CHOSEN, *OTHERS],
        "margin_s": 0.0296,
    }
    return inference_pb2.PlacementDecision(**defaults | fields)


def ended(**fields: Any) -> inference_pb2.Actual:
    defaults: dict[str, Any] = {
        "outcome": "finished",
        "queue_s": 0.001,
        "prefill_queue_s": 0.004,
        "prefill_s": 0.4501,
        "transfer_exposed_s": 0.0007,
        "ttft_s": 0.4567,
        "itl_s": 0.0091,
        "cached_tokens": 4096,
        "completion_tokens": 343,
        "prefill_worker": "prefill-0",
    }
    return inference_pb2.Actual(**defaults | fields)


def decision(*placements: inference_pb2.PlacementDecision) -> dict[str, Any]:
    return as_json(inference_pb2.Decision(request_id="req-1", placements=placements))


def text(told: dict[str, Any]) -> str:
    console = Console(width=COLUMNS)
    with console.capture() as captured:
        console.print(render(told))
    shown = captured.get()
    assert all(len(line) <= COLUMNS for line in shown.splitlines())
    return shown


def rows(shown: str, *starts: str) -> list[list[str]]:
    lines = [line.split() for line in shown.splitlines()]
    return [line for line in lines if any(line[: len(start.split())] == start.split() for start in starts)]


def test_the_chosen_pair_comes_first_with_each_term_in_milliseconds() -> None:
    shown = text(decision(placement(actual=ended())))
    (chosen,) = rows(shown, "→")
    assert chosen == ["→", "prefill-0", "decode-1", "4,096", "3.1", "421", "0.4", "0.0", "425"]
    (second,) = rows(shown, "prefill-0 decode-0")
    assert second[-2:] == ["30.0", "454"]
    assert "(decode worker)" in shown, "where no prefill worker is part of it"
    assert "Chosen by 29.6 ms less than the next." in shown
    assert "12,035 prompt tokens, placed by least-added-latency on router router-1" in shown


def test_columns_that_say_nothing_are_left_out() -> None:
    shown = text(decision(placement()))
    for absent in ("restore", "admission", "evicted", "pool"):
        assert absent not in shown
    other_pool = candidate("decode-9", "prefill-9", prefill_s=1, restore_s=0.5, pool="l4")
    shown = text(decision(placement(candidates=[CHOSEN, other_pool])))
    assert "restore" in shown and "pool" in shown and "l4" in shown


def test_what_was_predicted_stands_beside_what_was_measured() -> None:
    shown = text(decision(placement(actual=ended())))
    assert rows(shown, "queue and admission,")[0][-2:] == ["3.1", "5.0"]
    assert rows(shown, "restore and prefill,")[0][-2:] == ["421", "450"]
    assert rows(shown, "transfer not hidden,")[0][-2:] == ["0.4", "0.7"]
    assert rows(shown, "time to first token,")[0][-2:] == ["425", "457"]
    assert rows(shown, "inter-token latency,")[0][-2:] == ["8.0", "9.1"]
    assert rows(shown, "cached tokens")[-1][-2:] == ["4,096", "4,096"]
    assert "The request finished, with 343 tokens generated.\n" in shown


def test_a_request_under_way_shows_what_is_known() -> None:
    assert "No token has come of it yet." in text(decision(placement()))
    shown = text(decision(placement(actual=inference_pb2.Actual(outcome="running", ttft_s=0.5, cached_tokens=7))))
    assert "The request runs." in shown and "time to first token" in shown
    assert "restore and prefill" not in shown, "the worker tells at the end"


def test_another_prefill_worker_than_planned_is_told() -> None:
    shown = " ".join(text(decision(placement(actual=ended(prefill_worker="prefill-7")))).split())
    assert "Its prompt was computed on prefill-7, not as planned." in shown
    shown = " ".join(text(decision(placement(actual=ended(prefill_worker="")))).split())
    assert "Its prompt was computed on the decode worker, not as planned." in shown


def test_several_placements_are_shown_in_order() -> None:
    first = placement(actual=ended(outcome="failed", completion_tokens=3))
    shown = text(decision(first, placement(attempt=2), placement(choice=1)))
    headings = [line for line in shown.splitlines() if line.startswith("Choice")]
    assert headings == ["Choice 0, attempt 1", "Choice 0, attempt 2", "Choice 1, attempt 1"]
    assert "The request failed, with 3 tokens generated." in shown


def test_who_was_excluded_is_told_by_reason() -> None:
    excluded = [inference_pb2.Excluded(worker=f"decode-{n}", reason="draining") for n in range(10)]
    excluded.append(inference_pb2.Excluded(worker="decode-x", reason="cooling down for 4 s"))
    shown = " ".join(text(decision(placement(excluded=excluded))).split())
    assert "Excluded: decode-0, decode-1, decode-2" in shown and "decode-7 and 2 more (draining)." in shown
    assert "Excluded: decode-x (cooling down for 4 s)." in shown


def test_where_cached_tokens_come_from_is_told_unless_it_is_hbm_alone() -> None:
    cached = {"cached_tokens_hbm": 512, "cached_tokens_ssd": 2048, "cached_tokens_peer": 1536}
    fetching = candidate("d", "p1", restore_s=0.02, fetch_from="p0", **cached)
    shown = " ".join(text(decision(placement(candidates=[fetching, CHOSEN]))).split())
    told = "not computed: 512 in HBM, 2,048 restored from SSD, 1,536 fetched from p0."
    assert told in shown and "4,096" in shown, "the table has their sum"
    assert "not computed" not in text(decision(placement()))


def test_what_was_restored_and_fetched_stands_beside_what_was_planned() -> None:
    fetching = candidate("d", "p1", restore_s=0.02, prefill_s=0.1, cached_tokens_ssd=2048, cached_tokens_peer=1536)
    came = ended(prefill_s=0.11, fetch_s=0.015, fetched_tokens=1024, restored_tokens=2048, restore_s=0.005)
    shown = text(decision(placement(candidates=[fetching, CHOSEN], actual=came)))
    assert rows(shown, "restored tokens")[0][-2:] == ["2,048", "2,048"]
    assert rows(shown, "fetched tokens")[0][-2:] == ["1,536", "1,024"]
    assert rows(shown, "restore and prefill,")[0][-2:] == ["120", "125"], "a fetch ends before the prefill begins"
    assert "restored tokens" not in text(decision(placement(actual=ended())))


def test_a_single_candidate_has_no_margin() -> None:
    assert "less than the next" not in text(decision(placement(candidates=[CHOSEN])))


def test_long_names_and_all_terms_stay_within_the_columns() -> None:
    every = dict.fromkeys(("queue_s", "restore_s", "prefill_s", "transfer_s", "admission_s", "decode_s"), 0.1234)
    every |= dict.fromkeys(("others_decode_s", "others_queue_s", "others_evicted_s"), 0.1234)
    name = "baton-llama-70b-decode-7c9f5d6b8f-x2x4z"
    shown = text(decision(placement(candidates=[candidate(name, name.replace("decode", "prefill"), **every)])))
    assert "1,111" in shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0.0"), (0.00001, "0.01"), (0.0031, "3.1"), (0.0999, "99.9"), (0.4212, "421"), (12, "12,000")],
)
def test_milliseconds_have_three_digits_or_so(seconds: float, shown: str) -> None:
    assert milliseconds(seconds) == shown


def test_the_command_prints_the_table_or_the_body(router: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    told = decision(placement(actual=ended()))
    router.body = json.dumps(told).encode()
    assert run(["explain", "req-1", "--url", router.url, "--api-key", "sk-1"]) == 0
    shown = capsys.readouterr().out
    assert "→" in shown and all(len(line) <= COLUMNS for line in shown.splitlines())
    assert run(["explain", "a/b", "--url", router.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert router.paths == ["/v1/decisions/req-1", "/v1/decisions/a%2Fb"]
    assert router.authorizations == ["Bearer sk-1", None]


def test_the_key_may_come_by_variable(router: Canned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_API_KEY", "sk-2")
    router.body = json.dumps({"data": []}).encode()
    assert run(["status", "--url", router.url]) == 0
    assert router.authorizations == ["Bearer sk-2"]


def test_what_the_router_says_is_passed_on(router: Canned) -> None:
    router.status, router.body = 404, b'{"error": {"message": "No router remembers this request."}}'
    with pytest.raises(InvalidRequest, match="No router remembers"):
        fetch_decision(router.url, "req-1")
    router.status = 503
    with pytest.raises(Unavailable, match="No router remembers"):
        fetch_decision(router.url, "req-1")
    router.status, router.body = 200, b"{}"
    with pytest.raises(Unavailable, match="not as a Baton router does"):
        fetch_decision(router.url, "req-1")
