"""The command line as a process: what goes wrong is one sentence, soon, and without a traceback."""

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cluster.redis_server import EmbeddedRedis
from launcher import progress
from launcher.cli import run

SECONDS = 40.0
"""Two or so, most of them imports, on a machine that has nothing else to do."""
NOBODY = "127.0.0.1:1"
NO_REDIS = f"redis://me:secret@{NOBODY}/0"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands set up logging for their whole process, which here is the tests'."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def baton(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    started_s = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
    )
    assert time.monotonic() - started_s < SECONDS
    return ended


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from launcher.cli import run; run(['up', '--help']);"
        "heavy = {'torch', 'ray', 'transformers', 'fastapi', 'grpc', 'redis'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "--http-port" in ended.stdout and "--redis" in ended.stdout


def test_every_command_has_help() -> None:
    for command in ("up", "router", "prefill-worker", "decode-worker", "status", "cache", "explain", "demo", "version"):
        assert run([command, "--help"]) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_no_command_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Commands" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nonsense"], 2, "No such command"),
        (["up", "--nonsense"], 2, "No such option"),
        (["up", "--http-port", "http"], 2, "--http-port"),
        (["up", "--http-port", "70000"], 2, "http_port"),
        (["up", "--decode", "0"], 2, "decode"),
        (["up", "--transports", "pigeon"], 2, "transports"),
        (["up", "--config", "/nowhere.yaml"], 2, "/nowhere.yaml does not exist"),
        (["up", "--http-port", "0", "--model", "/nowhere"], 2, "The model directory /nowhere does not exist"),
        (["up", "--http-port", "0", "--redis", NO_REDIS], 1, "Connection refused|Connect call failed"),
        (["up", "--http-port", "0", "--redis", "nonsense"], 2, "not a Redis URL"),
        (["up", "--http-port", "0", "--ray-address", "10.0.0.1:1"], 2, "--redis"),
        (["prefill-worker", "--redis-url", NO_REDIS], 1, "Connection refused"),
        (["decode-worker", "--model", "/nowhere"], 2, "/nowhere"),
        (["router", "--redis-url", NO_REDIS], 1, "Connection refused"),
        (["explain", "x", "--url", f"http://{NOBODY}"], 1, "No router"),
        (["explain"], 2, "request_id"),
        (["status", "--url", f"http://{NOBODY}"], 1, "No router"),
    ],
)
def test_an_error_is_one_sentence(
    arguments: list[str], code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_S", SECONDS)
    assert run(arguments) == code
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1
    assert re.search(says, told.err) and "secret" not in told.err


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ("nonsense", "models"),
        ('[{"name": "a"}]', "models.0.model: Field required"),
        ('[{"name": "a", "model": "x"}, {"name": "b", "model": "x", "aliases": ["a"]}]', "'a' is given twice"),
        ('[{"name": "a", "model": "/nowhere"}]', "model directory /nowhere"),
    ],
)
def test_models_that_cannot_be_served_are_told(
    models: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_MODELS", models)
    assert run(["router", "--redis-url", NO_REDIS]) == 2
    told = capsys.readouterr().err
    assert says in told and told.startswith("error: ") and told.count("\n") == 1


def test_up_serves_the_model_that_its_workers_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_MODELS", '[{"name": "a", "model": "x"}]')
    assert run(["up", "--http-port", "0"]) == 2
    assert "models must name 'recall' too" in capsys.readouterr().err


def test_a_model_that_no_hub_knows_is_told_within_seconds() -> None:
    ended = baton("up", "--http-port", "0", "--model", "nobody/has-this-model")
    assert ended.returncode == 2
    (error,) = (line for line in ended.stderr.splitlines() if not line.startswith("looking for the model"))
    assert error.startswith("error: nobody/has-this-model is neither")


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    ended = baton("up", "--http-port", "0", BATON_MODEL=str(tmp_path))
    assert ended.returncode == 2 and "config.json" in ended.stderr


def test_a_traceback_comes_only_when_asked_for() -> None:
    quiet = baton("router", "--redis-url", NO_REDIS)
    loud = baton("router", "--redis-url", NO_REDIS, "--log-level", "debug")
    assert quiet.returncode == loud.returncode == 1
    assert "Traceback" not in quiet.stderr and "Traceback" in loud.stderr
    assert "secret" not in loud.stderr


def test_a_bug_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("launcher.status.fetch_workers", fail)
    assert run(["status"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ZeroDivisionError" in error


def test_a_router_whose_model_has_no_weights_says_so(
    redis_server: EmbeddedRedis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert run(["router", "--redis-url", redis_server.url, "--model", str(tmp_path), "--http-port", "0"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and re.search(r"^error: .*safetensors", told.err, re.MULTILINE)
