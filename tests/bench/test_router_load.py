"""bench.router_load: the whole of it once, in its three processes; and how a profile is read."""

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

from bench import router_load
from bench.child import Stats
from bench.where import BELOW, OTHER, place_of, shares


def test_a_small_load_through_both_doors() -> None:
    app = Typer()
    app.command()(router_load.main)
    options = ["--concurrency", "3", "--requests", "6", "--output", "5", "--prompt", "50", "--step-ms", "0"]
    result = CliRunner().invoke(app, [*options, "--profile", "2", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert [(level["door"], level["concurrency"]) for level in said["levels"]] == [("http", 3), ("grpc", 3)]
    for level in said["levels"]:
        assert (level["requests"], level["failures"], level["output_tokens"]) == (6, 0, 30)
        assert level["cpu_per_token_s"] > 0 and level["requests_per_s"] > 0
    assert sum(said["where"]["http"].values()) == pytest.approx(1)
    assert said["where"]["grpc"]["gRPC, protobuf"] > 0


@pytest.mark.parametrize("door", ["ftp", "http,http", ""])
def test_an_unknown_door_is_refused(door: str) -> None:
    app = Typer()
    app.command()(router_load.main)
    assert CliRunner().invoke(app, ["--door", door]).exit_code == 2


def test_a_c_function_counts_where_it_was_called() -> None:
    answer, loop = ("/x/router/http/answer.py", 1, "chunk"), ("/y/asyncio/tasks.py", 2, "step")
    encode = ("~", 0, "<encode>")
    stats: Stats = {
        answer: (1, 1, 1.0, 3.0, {}),
        loop: (1, 1, 0.5, 0.5, {}),
        encode: (3, 3, 2.5, 2.5, {answer: (2, 2, 2.0, 2.0), loop: (1, 1, 0.5, 0.5)}),
    }
    assert shares(stats, cpu_s=8.0) == {BELOW: 0.5, "answer, JSON, SSE": 0.375, "asyncio": 0.125}


def test_files_are_sorted_by_what_they_do() -> None:
    assert place_of("/a/router/http/io.py") == "answer, JSON, SSE"
    assert place_of("/a/router/http/api.py") == "HTTP server"
    assert place_of("/usr/lib/python3.11/uuid.py") == OTHER
