"""bench.transfer: what it moves, its ends, its figures."""

import json
import sys
from pathlib import Path

import pytest

from bench.transfer import Results, measure_all, measure_turn, speed_table, to_json
from bench.transfer_end import PROJECT, End, EndFailed, fill, flat_slices, tails_checksum
from bench.transfer_plan import GIB, KIB, MIB, SLICE_BYTES, TOTAL_BYTES, Form, forms_of, hull
from bench.transfer_sides import Figures, Side, baselines, measure, own_sides, peer_sides

SMALL = [Form.of(64 * KIB, MIB), Form.of(64 * KIB, 4 * MIB)]


# ---- the plan


@pytest.mark.parametrize("slice_bytes", SLICE_BYTES)
def test_a_form_is_as_large_as_was_asked(slice_bytes: int) -> None:
    forms = forms_of(slice_bytes, TOTAL_BYTES)
    assert [form.total_bytes for form in forms] == [total for total in TOTAL_BYTES if total >= 2 * slice_bytes]
    sizes = hull(forms)
    assert all(form.layers <= sizes.layers and form.blocks <= sizes.blocks for form in forms)
    assert sizes.total_bytes == GIB


def test_layers_are_written_in_runs_as_chunks_are() -> None:
    assert Form.of(64 * KIB, MIB) == Form(64 * KIB, layers=1, blocks=8)
    assert Form.of(64 * KIB, 16 * MIB) == Form(64 * KIB, layers=8, blocks=16)
    assert Form.of(64 * KIB, GIB) == Form(64 * KIB, layers=32, blocks=256)


def test_slices_differ_at_their_ends() -> None:
    form = Form(64, layers=1, blocks=4)
    memory = memoryview(bytearray(form.total_bytes))
    fill(memory, form.slice_bytes)
    checksum = tails_checksum(flat_slices(memory, form))
    memory[64:128], memory[128:192] = bytes(memory[128:192]), bytes(memory[64:128])
    assert tails_checksum(flat_slices(memory, form)) != checksum


# ---- ends


def interpreter(directory: Path, program: str) -> Path:
    """Stands in for a Python: whatever it is told to run, it runs this."""
    (directory / "end.py").write_text(program)
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} {directory / "end.py"} "$@"\n')
    python.chmod(0o755)
    return python


SCRIPTED = """
import asyncio, sys
from bench.transfer_end import answer
print("a library's greeting")
def refuse(): raise OSError("no such device")
def moved(at_least, **_): return {"each_s": [0.5, 0.25] * at_least, "cpu_s": 1.0}
calls = {"arguments": lambda: sys.argv[1:], "refuse": refuse, "die": lambda: sys.exit(3), "move": moved,
         "open": lambda: "here", "connect": lambda offer: None, "cpu": lambda: 7.0, "check": lambda **_: id(calls)}
asyncio.run(answer(calls, (OSError,)))
"""


def test_an_end_is_asked_over_a_link_of_its_own(tmp_path: Path) -> None:
    with End(interpreter(tmp_path, SCRIPTED), "bench.any", 64, "x") as end:
        assert end.ask("arguments") == ["-m", "bench.any", "64", "x"]
        with pytest.raises(EndFailed, match="no such device"):
            end.ask("refuse")
        assert end.ask("cpu") == 7.0


def test_an_end_that_dies_is_told(tmp_path: Path) -> None:
    with End(interpreter(tmp_path, SCRIPTED), "bench.any") as end:
        for what in ("die", "cpu"):
            with pytest.raises(EndFailed, match=f"'{what}'"):
                end.ask(what)


def test_bytes_that_did_not_arrive_are_found(tmp_path: Path) -> None:
    side = Side("scripted", "bench.any", python=interpreter(tmp_path, SCRIPTED))
    moves = measure(side, SMALL, 0)
    assert next(moves)[0] == SMALL[0]
    with pytest.raises(EndFailed, match="not what was sent"):
        next(moves)


# ---- real ones


@pytest.mark.parametrize("side", [*baselines(), *own_sides(["shm", "tcp"])], ids=lambda side: side.name)
def test_what_can_be_measured_anywhere(side: Side) -> None:
    measured = dict(measure(side, SMALL, 0))
    assert list(measured) == SMALL
    for form, figures in measured.items():
        assert figures.total_bytes == form.total_bytes
        assert figures.gb_per_s >= figures.gb_per_s_median > 0 and figures.cpu_s > 0
        assert len(figures.latencies_s) == (200 if side.has_two_ends else 0)


# ---- figures


def test_figures_of_rounds_add_up() -> None:
    figures = Figures(10**9, [0.5, 0.25], 1.0, [1e-6])
    figures.add(Figures(10**9, [1.0, 1.0], 2.0, [3e-6]))
    assert (figures.gb_per_s, figures.gb_per_s_median) == (4.0, 1 / 0.75)
    assert figures.cpu_s_per_gb == 0.75
    assert figures.latencies_s == [1e-6, 3e-6]


def test_sides_take_turns_and_one_that_fails_has_no_more(tmp_path: Path) -> None:
    results, log = Results(), list[int]()
    broken = Side("ucx", "bench.transfer_own", ("no-such-transport",))
    scripted = Side("shm", "bench.any", python=interpreter(tmp_path, SCRIPTED.replace("id(calls)", "1")))
    measure_all([broken, scripted], [64 * KIB], [MIB], 2, results, lambda: log.append(1))
    assert len(log) == 4 and list(results.left_out) == ["ucx"]
    form = Form.of(64 * KIB, MIB)
    assert len(results.by_side["shm"][form].latencies_s) == 2 * 400


def test_the_result_has_the_agreed_keys() -> None:
    results = Results(left_out={"ucx": "It is not installed."})
    for name, best_s in (("memcpy", 0.1), ("socket", 0.5), ("shm", 0.125), ("nixl-read", 0.25)):
        for form in SMALL:
            latencies = [] if name == "memcpy" else [2e-6]
            results.by_side.setdefault(name, {})[form] = Figures(form.total_bytes, [best_s], 1.0, latencies)
    told = json.loads(json.dumps(to_json(results)))
    assert told["memcpy_gb_per_s"] == 4 * MIB / 0.1 / 1e9
    assert told["socket_gb_per_s"] == 4 * MIB / 0.5 / 1e9
    assert [row["transport"] for row in told["results"]] == ["shm", "shm"]
    assert [row["transport"] for row in told["peer"]] == ["nixl-read", "nixl-read"]
    row = told["results"][1]
    assert (row["slice_bytes"], row["total_bytes"], row["gb_per_s"]) == (64 * KIB, 4 * MIB, 4 * MIB / 0.125 / 1e9)
    assert row["latency_s"] == 2e-6 and row["cpu_s_per_gb"] > 0
    assert speed_table(results).row_count == 4


PEER = """
import asyncio, sys
from bench.transfer_end import answer
assert sys.argv[1:3] == ["-m", "bench.transfer_peer"], sys.argv
operations = set()
def move(operation, **_):
    operations.add(operation)
    return {"each_s": [1.0], "cpu_s": 1.0}
asyncio.run(answer({"open": lambda: "here", "connect": lambda offer: None, "move": move, "cpu": lambda: 0.0,
                    "check": lambda **_: sorted(operations) and 1 or 1}))
"""


def test_the_peer_is_asked_to_write_and_to_read(tmp_path: Path) -> None:
    sides, results = peer_sides(interpreter(tmp_path, PEER)), Results()
    for side in sides:
        measure_turn(side, SMALL, results)
    assert list(results.by_side) == ["nixl-write", "nixl-read", "nixl-write-private", "nixl-read-private"]
    assert not results.left_out
