"""Where the cluster secret comes from, and what is refused."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from baton.errors import SettingsError
from baton.secret import SECRET_BYTES_MAX, cluster_secret, with_secret
from baton.settings import DecodeWorkerSettings, UpSettings

SECRET = "correct horse battery staple"


def test_there_need_be_none() -> None:
    assert cluster_secret(DecodeWorkerSettings()) is None


def test_it_comes_as_a_value_or_from_a_file(tmp_path: Path) -> None:
    assert cluster_secret(DecodeWorkerSettings(cluster_secret=SecretStr(SECRET))) == SECRET.encode()
    assert cluster_secret(DecodeWorkerSettings(cluster_secret_file=secret_file(tmp_path))) == SECRET.encode()


def secret_file(folder: Path, content: bytes = SECRET.encode() + b"\n", mode: int = 0o600) -> Path:
    file = folder / "secret"
    file.write_bytes(content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_a_files_last_line_end_is_not_part_of_it(tmp_path: Path, ending: bytes) -> None:
    file = secret_file(tmp_path, SECRET.encode() + ending)
    assert cluster_secret(DecodeWorkerSettings(cluster_secret_file=file)) == SECRET.encode()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"fifteen bytes..", "has 15 bytes; it must have at least 16"),
        (b"x" * (SECRET_BYTES_MAX + 1), "longer than"),
        (b"\xff" * 32, "not text"),
    ],
)
def test_what_cannot_be_one_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = secret_file(tmp_path, content)
    with pytest.raises(SettingsError, match=sentence) as caught:
        cluster_secret(DecodeWorkerSettings(cluster_secret_file=file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602])
def test_a_file_that_anybody_can_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SettingsError, match=rf"mode {mode:03o}\); chmod 600") as caught:
        cluster_secret(DecodeWorkerSettings(cluster_secret_file=secret_file(tmp_path, mode=mode)))
    assert SECRET not in str(caught.value)


def test_its_group_may_read_it(tmp_path: Path) -> None:
    file = secret_file(tmp_path, mode=0o440)
    assert cluster_secret(DecodeWorkerSettings(cluster_secret_file=file)) == SECRET.encode()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        cluster_secret(DecodeWorkerSettings(cluster_secret_file=tmp_path / "none"))


def test_two_are_refused(tmp_path: Path) -> None:
    settings = DecodeWorkerSettings(cluster_secret=SecretStr(SECRET), cluster_secret_file=secret_file(tmp_path))
    with pytest.raises(SettingsError, match="both set"):
        cluster_secret(settings)


def test_a_short_value_is_refused_without_telling_it() -> None:
    with pytest.raises(SettingsError, match="at least 16") as caught:
        cluster_secret(DecodeWorkerSettings(cluster_secret=SecretStr("hunter2")))
    assert "hunter2" not in str(caught.value)


def test_workers_of_one_process_get_one_drawn_for_them() -> None:
    drawn = [with_secret(UpSettings()) for _ in range(2)]
    secrets = [cluster_secret(settings) for settings in drawn]
    assert secrets[0] != secrets[1] and all(secret and len(secret) == 64 for secret in secrets)
    assert (secrets[0] or b"").decode() not in repr(drawn[0])


def test_workers_of_one_process_get_what_the_file_holds_and_not_its_path(tmp_path: Path) -> None:
    settings = with_secret(UpSettings(cluster_secret_file=secret_file(tmp_path)))
    assert settings.cluster_secret_file is None and cluster_secret(settings) == SECRET.encode()
