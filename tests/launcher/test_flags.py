import inspect
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from baton.errors import SettingsError
from baton.settings import DecodeWorkerSettings, RouterSettings, UpSettings
from launcher.flags import takes_settings


def command(kind: type[RouterSettings], *arguments: str, **options: object) -> RouterSettings:
    """What the command gets when it is called like that."""
    got: list[RouterSettings] = []
    app = typer.Typer()
    app.command()(takes_settings(kind, **options)(got.append))  # type: ignore[arg-type]
    outcome = CliRunner().invoke(app, arguments)
    if outcome.exception is not None:
        raise outcome.exception
    return got[0]


def test_each_field_is_a_flag_with_its_description() -> None:
    def run(settings: DecodeWorkerSettings) -> None: ...

    parameters = inspect.signature(takes_settings(DecodeWorkerSettings)(run)).parameters
    secrets = {"cluster_secret"}  # a flag would be seen in the list of processes
    assert set(parameters) == set(DecodeWorkerSettings.model_fields) - secrets | {"config"}


def test_values_arrive_typed() -> None:
    settings = command(UpSettings, "--http-port", "0", "--drain-timeout-s", "1.5", "--no-prefix-cache", "--model", "m")
    assert isinstance(settings, UpSettings)
    assert (settings.http_port, settings.drain_timeout_s, settings.prefix_cache, settings.model) == (0, 1.5, False, "m")


def test_lists_are_written_with_commas() -> None:
    settings = command(UpSettings, "--transports", "tcp, shm")
    assert isinstance(settings, UpSettings) and settings.transports == ("tcp", "shm")


def test_an_alias_is_as_good_as_the_name() -> None:
    aliases = {"redis_url": "--redis"}
    for name in ("--redis", "--redis-url"):
        assert command(UpSettings, name, "redis://h:1", aliases=aliases).redis_url == "redis://h:1"


def test_hidden_fields_have_no_flag() -> None:
    with pytest.raises(SystemExit):
        command(UpSettings, "--worker-id", "x", hidden=frozenset({"worker_id"}))


def test_lists_of_objects_have_no_flag_but_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        command(RouterSettings, "--models", "x")
    monkeypatch.setenv("BATON_MODELS", '[{"name": "a", "model": "/a", "upstream": {"url": "http://h/v1"}}]')
    (model,) = command(RouterSettings, "--tenants-file", "/etc/tenants.yaml").models
    assert model.name == "a" and model.upstream is not None and model.upstream.use == "overflow"


def test_a_file_arrives_as_a_path() -> None:
    assert command(RouterSettings, "--tenants-file", "/etc/tenants.yaml").tenants_file == Path("/etc/tenants.yaml")


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("http_port: 1\ngrpc_port: 1\nkey_prefix: file\n")
    monkeypatch.setenv("BATON_HTTP_PORT", "2")
    monkeypatch.setenv("BATON_GRPC_PORT", "2")
    settings = command(RouterSettings, "--http-port", "3", "--config", str(config))
    assert (settings.http_port, settings.grpc_port, settings.key_prefix) == (3, 2, "file")


def test_what_only_the_settings_can_judge_is_their_error() -> None:
    with pytest.raises(SettingsError, match="http_port"):
        command(RouterSettings, "--http-port", "99999")


@pytest.mark.parametrize(
    ("given", "size"), [("4096", 4096), ("4GiB", 4 * 2**30), ("1.5 MB", 1_500_000), ("2kib", 2048), ("7b", 7)]
)
def test_sizes_may_have_a_unit(given: str, size: int) -> None:
    settings = command(UpSettings, "--ddr-bytes", given)
    assert isinstance(settings, UpSettings) and settings.ddr_bytes == size


@pytest.mark.parametrize("given", ["4 G", "GiB", "-1", "1e9", "4 GiBs"])
def test_what_is_no_size_is_told(given: str) -> None:
    with pytest.raises(SettingsError, match="ddr_bytes: a size looks like"):
        command(UpSettings, "--ddr-bytes", given)


def test_sizes_may_have_a_unit_in_variables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_DDR_BYTES", "1GiB")
    settings = command(UpSettings)
    assert isinstance(settings, UpSettings) and settings.ddr_bytes == 2**30
