"""Traces: read with the wrong line named, sped up, made unique, bounded; and made up by a seed."""

import json
from pathlib import Path

import pytest

from baton.errors import InvalidRequest
from simulator.trace import (
    TRACE_BLOCK_TOKENS,
    TraceRequest,
    answer_block_name,
    at_rate,
    hit_rate_max,
    made_unique,
    prompt_block_name,
    read_trace,
    write_trace,
)
from simulator.workloads import Conversations, Strangers

GOOD = {"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_line_is_a_request(tmp_path: Path) -> None:
    (request,) = read_trace(write(tmp_path / "trace.jsonl", GOOD))
    assert request == TraceRequest(arrival_s=1.5, prompt_tokens=600, output_tokens=5, block_ids=(1, 2))


def test_requests_come_in_the_order_of_arrival(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "trace.jsonl", GOOD, {**GOOD, "timestamp": 0}, "", GOOD))
    assert [request.arrival_s for request in trace] == [0.0, 1.5, 1.5]


def test_a_limit_reads_the_first_lines_only(tmp_path: Path) -> None:
    assert len(read_trace(write(tmp_path / "trace.jsonl", GOOD, GOOD, "not JSON"), limit=2)) == 2


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("not JSON", "JSON"),
        ({**GOOD, "timestamp": -1}, "timestamp"),
        ({**GOOD, "input_length": 0}, "input_length"),
        ({**GOOD, "input_length": "600"}, "input_length"),
        ({**GOOD, "hash_ids": [1]}, "600 tokens are 2 blocks"),
        ({"timestamp": 0}, "input_length"),
    ],
)
def test_the_wrong_line_is_named(tmp_path: Path, bad: object, says: str) -> None:
    with pytest.raises(InvalidRequest, match="Line 2 of the trace") as caught:
        read_trace(write(tmp_path / "trace.jsonl", GOOD, bad))
    assert says in str(caught.value)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_trace(tmp_path / "nowhere.jsonl")
    with pytest.raises(InvalidRequest, match="holds no request"):
        read_trace(write(tmp_path / "empty.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_trace(tmp_path / "binary.jsonl")


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    trace = Conversations().trace(20, seed=1)
    write_trace(tmp_path / "trace.jsonl", trace)
    read = read_trace(tmp_path / "trace.jsonl")
    assert [request.block_ids for request in read] == [request.block_ids for request in trace]


def test_a_rate_squeezes_time() -> None:
    assert [request.arrival_s for request in at_rate([TraceRequest(3.0, 1, 1, (1,))], 2.0)] == [1.5]


def test_the_bound_counts_prefixes_alone() -> None:
    trace = [
        TraceRequest(0, 3 * TRACE_BLOCK_TOKENS, 1, (1, 2, 3)),
        TraceRequest(1, 3 * TRACE_BLOCK_TOKENS, 1, (1, 2, 4)),
        TraceRequest(2, 2 * TRACE_BLOCK_TOKENS, 1, (9, 3)),
    ]
    assert hit_rate_max(trace) == 2 / 8
    assert hit_rate_max(made_unique(trace)) == 0


def test_names_of_blocks_differ() -> None:
    names = [prompt_block_name(n) for n in range(100)] + [answer_block_name(n, m) for n in range(10) for m in range(10)]
    assert len({name[:8] for name in names}) == len(names), "also by the half of them that the index keeps"
    assert {len(name) for name in names} == {16}


def test_conversations_repeat_their_history() -> None:
    trace = Conversations(starts_per_s=2.0).trace(300, seed=3)
    assert (
        trace
        == Conversations(starts_per_s=2.0).trace(300, seed=3)
        != Conversations(starts_per_s=2.0).trace(300, seed=4)
    )
    assert trace == sorted(trace, key=lambda request: request.arrival_s)
    assert 0.4 < hit_rate_max(trace) < 0.95
    for request in trace:
        assert len(request.block_ids) == -(-request.prompt_tokens // TRACE_BLOCK_TOKENS)


def test_strangers_share_nothing() -> None:
    trace = Strangers(arrivals_per_s=2.0).trace(400, seed=3)
    assert hit_rate_max(trace) == 0
    assert 400 / trace[-1].arrival_s == pytest.approx(2.0, rel=0.2)
