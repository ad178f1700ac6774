from pathlib import Path

import pytest

from baton.errors import SettingsError
from baton.settings import DecodeWorkerSettings, RouterSettings, UpSettings, load_settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "baton.yaml"
    path.write_text("kv_blocks: 1\nblock_tokens: 1\nthreads: 1\n")
    return path


def test_flags_win_over_variables_and_variables_over_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_KV_BLOCKS", "2")
    monkeypatch.setenv("BATON_BLOCK_TOKENS", "2")
    settings = load_settings(DecodeWorkerSettings, {"kv_blocks": 3, "block_tokens": None}, config)
    assert (settings.kv_blocks, settings.block_tokens, settings.threads) == (3, 2, 1)


def test_every_bad_value_is_named_in_one_sentence() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(RouterSettings, {"http_port": 70000, "log_level": "loud"})
    message = str(caught.value)
    assert "http_port" in message and "log_level" in message and "\n" not in message


def test_a_bad_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_KV_BLOCKS", "hunter2")
    with pytest.raises(SettingsError) as caught:
        load_settings(DecodeWorkerSettings, {})
    assert "hunter2" not in str(caught.value)


def test_an_unknown_key_in_the_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text("htpt_port: 1\n")
    with pytest.raises(SettingsError, match="htpt_port"):
        load_settings(RouterSettings, {}, path)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n"])
def test_a_file_that_is_no_mapping_is_told_in_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baton.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError):
        load_settings(RouterSettings, {}, path)


def test_a_missing_file_is_told() -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        load_settings(RouterSettings, {}, Path("/nowhere.yaml"))


def test_settings_are_frozen() -> None:
    settings = load_settings(RouterSettings, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.http_port = 1


def test_names_fall_back_to_what_they_stand_for() -> None:
    plain = load_settings(RouterSettings, {"model": "dir/model"})
    assert (plain.model_name, plain.reachable_host) == ("dir/model", "127.0.0.1")
    named = load_settings(RouterSettings, {"served_model_name": "m", "host": "0.0.0.0", "advertise_host": "h"})
    assert (named.model_name, named.reachable_host) == ("m", "h")


def test_up_takes_what_its_services_take() -> None:
    assert set(UpSettings.model_fields) >= set(RouterSettings.model_fields) | set(DecodeWorkerSettings.model_fields)


@pytest.mark.parametrize("kind", [RouterSettings, DecodeWorkerSettings, UpSettings])
def test_every_setting_is_described(kind: type[RouterSettings]) -> None:
    undescribed = [name for name, field in kind.model_fields.items() if not field.description]
    assert undescribed in ([], ["log_level"])  # whose choices speak for themselves
