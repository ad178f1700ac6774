"""bench.router: its workload, its two sides, its figures."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from bench.router import USUAL, Latency, measure_select, to_json
from bench.router_own import Events, OwnSide
from bench.router_sides import EventFigures, PeerSide
from bench.router_workload import BLOCK_TOKENS, FORMS, HOLDERS, Form, Workload

SMALL = Workload(workers=4, indexed_blocks=600, prompt_blocks=32)


# ---- the workload


def test_the_same_workload_asks_the_same_in_any_process() -> None:
    first, second = SMALL.prompts("select"), replace(SMALL).prompts("select")
    prompts = list(islice(first, 20))
    assert prompts == list(islice(second, 20))
    assert len({tuple(prompt) for prompt in prompts}) == 20
    assert prompts != list(islice(SMALL.prompts("other"), 20))


def test_a_prompt_goes_on_from_a_conversations_first_blocks() -> None:
    conversations = [SMALL.conversation(index).tokens for index in range(SMALL.conversations)]
    known_blocks = set()
    for prompt in islice(SMALL.prompts("select"), 20):
        assert len(prompt) == 32 * BLOCK_TOKENS
        known_blocks.add(max(common_tokens(prompt, each) for each in conversations) // BLOCK_TOKENS)
    assert min(known_blocks) >= SMALL.shared_blocks and max(known_blocks) <= 32
    assert len(known_blocks) > 5


def common_tokens(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("pools", [1, 2])
def test_a_conversation_lies_on_two_workers_one_in_each_pool(pools: int) -> None:
    workload = replace(SMALL, pools=pools)
    for index in range(workload.conversations):
        holders = workload.conversation(index).holders
        assert len(set(holders)) == HOLDERS and set(holders) <= set(range(4))
        if pools == 2:
            assert holders[0] < 2 <= holders[1]


def test_what_is_removed_was_stored_and_half_of_it_stays() -> None:
    stored, removed = list(SMALL.stored()), list(SMALL.removed())
    assert sum(step.end - step.first for step in stored) == SMALL.holdings
    kept = {(step.worker, step.conversation, step.first, step.end) for step in stored}
    gone = {(step.worker, step.conversation, step.first, step.end) for step in removed}
    assert gone < kept and all(step.conversation % 2 == 0 for step in removed)
    assert len(gone) == len(removed)


# ---- measuring


class ScriptedSide:
    def __init__(self, log: list[str], name: str, each_us: Iterator[float]) -> None:
        self._log, self._name, self._each_us = log, name, each_us

    def start(self, workload: Workload, in_flight: int) -> None:
        del workload, in_flight
        self._log.append(f"{self._name} starts")

    def select(self, selections: int, form: Form) -> list[float]:
        del form
        self._log.append(self._name)
        return list(islice(self._each_us, selections))

    def events(self, workload: Workload) -> EventFigures:
        raise NotImplementedError


def test_the_sides_take_turns_and_the_first_batch_does_not_count() -> None:
    log: list[str] = []
    ours = ScriptedSide(log, "ours", iter([1000.0] * 100 + [5.0] * 299 + [9.0]))
    peer = ScriptedSide(log, "peer", iter([1000.0] * 100 + [7.0] * 300))
    latencies = measure_select({"": ours, "peer_": peer}, SMALL, "tokens", 300)
    assert log == ["ours starts", "ours", "peer starts", "peer", *["ours", "peer"] * 3]
    assert (latencies[""].p50_us, latencies[""].p99_us) == (5.0, 5.0)
    assert latencies["peer_"].p50_us == 7.0


def test_the_result_has_the_agreed_keys() -> None:
    latencies = [Latency(replace(USUAL, workers=workers), 10.0, 20.0) for workers in (8, 64)]
    figures = [EventFigures(blocks, 1e6, 1e6, 80.0) for blocks in (10_000, 100_000)]
    result = to_json({"select": {"": latencies, "peer_": latencies[:1]}}, {"": figures, "peer_": figures})
    assert [(row["workers"], row["blocks"], row["p50_us"], row["p99_us"]) for row in result["select"]] == [
        (8, 128, 10.0, 20.0),
        (64, 128, 10.0, 20.0),
    ]
    assert len(result["peer_select"]) == 1
    assert result["events_per_s"] == result["peer_events_per_s"] == 1e6
    assert result["index_bytes_per_block"] == 80.0
    json.dumps(result)


# ---- our side


@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_our_side_places_and_lets_go(pools: int, form: Form) -> None:
    side = OwnSide()
    side.start(replace(SMALL, pools=pools), in_flight=3)
    each_us = side.select(20, form)
    assert len(each_us) == 20 and min(each_us) > 0
    assert sum(load.sequences for load in side.placer.placed().values()) == 3


def test_our_side_finds_what_the_workload_stored() -> None:
    side = OwnSide()
    side.start(SMALL, in_flight=1)
    cached = [side.place(prompt).chosen.cached_tokens.total for prompt in islice(SMALL.prompts("look"), 10)]
    assert min(cached) >= SMALL.shared_blocks * BLOCK_TOKENS


def test_our_events_are_counted_in_blocks() -> None:
    figures = OwnSide().events(SMALL)
    assert figures.stored_per_s > 0 and figures.removed_per_s > 0
    assert 20 < figures.bytes_per_block < 2000
    events = Events(SMALL)
    assert len(events.stored) == len(list(SMALL.stored())) and len(events.removed) == len(list(SMALL.removed()))


# ---- the peer's side


def interpreter(directory: Path, program: str) -> Path:
    """Stands in for the peer's: whatever it is told to run, it runs this."""
    (directory / "peer.py").write_text(program)
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {directory / "peer.py"} "$@"\n')
    python.chmod(0o755)
    return python


ANSWERING = """
import json, sys
assert sys.argv[1:] == ["-m", "bench.router_peer"]
for line in sys.stdin:
    command = json.loads(line)
    answers = {"start": None, "select": [1.5] * command.get("selections", 0), "events": [2.0, 1.0, 4096]}
    print(json.dumps(answers[command["do"]]), flush=True)
"""


def test_the_peer_is_asked_over_a_pipe(tmp_path: Path) -> None:
    with PeerSide(interpreter(tmp_path, ANSWERING)) as peer:
        peer.start(SMALL, in_flight=2)
        assert peer.select(3, "hashes") == [1.5, 1.5, 1.5]
        assert peer.events(SMALL).stored_per_s == SMALL.holdings / 2.0


def test_a_peer_that_dies_is_named(tmp_path: Path) -> None:
    with (
        PeerSide(interpreter(tmp_path, "import sys; sys.stdin.readline()")) as peer,
        pytest.raises(RuntimeError, match="'start'"),
    ):
        peer.start(SMALL, in_flight=2)
