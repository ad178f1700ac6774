"""The cluster secret: what workers prove to each other that they belong together with."""

import os
import secrets
import stat
from pathlib import Path

from pydantic import SecretStr

from baton.errors import SettingsError
from baton.settings import ServiceSettings, Settings

SECRET_BYTES_MIN = 16
SECRET_BYTES_MAX = 4096
DRAWN_BYTES = 32


def cluster_secret(settings: ServiceSettings) -> bytes | None:
    """The value or the file's content that the settings name; None: there is none, and anybody may ask.

    Raises SettingsError with a sentence, which never holds the secret, if both are given, the file cannot be read or
    anybody can, or it is no text, too short or too long.
    """
    value, file = settings.cluster_secret, settings.cluster_secret_file
    if value is not None and file is not None:
        raise SettingsError("cluster_secret and cluster_secret_file are both set; give one of them.")
    if file is not None:
        return _checked(_read(file), f"The cluster secret file {file}")
    return None if value is None else _checked(value.get_secret_value().encode(), "The cluster_secret")


def with_secret(settings: Settings) -> Settings:
    """The settings for workers that one process starts, wherever they run: the secret itself in place of its file; one
    drawn for them alone if none is given. Raises as `cluster_secret` does."""
    secret = cluster_secret(settings)
    value = secrets.token_hex(DRAWN_BYTES) if secret is None else secret.decode()
    return settings.model_copy(update={"cluster_secret": SecretStr(value), "cluster_secret_file": None})


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            content = opened.read(SECRET_BYTES_MAX + 1)
    except OSError as error:
        raise SettingsError(f"The cluster secret file {file} cannot be read: {error.strerror}.") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise SettingsError(
            f"The cluster secret file {file} can be read or changed by anybody (mode {mode:03o}); chmod 600 it."
        )
    if len(content) > SECRET_BYTES_MAX:
        raise SettingsError(f"The cluster secret file {file} is longer than {SECRET_BYTES_MAX} bytes.")
    return content.removesuffix(b"\n").removesuffix(b"\r")


def _checked(secret: bytes, what: str) -> bytes:
    try:
        secret.decode()
    except UnicodeDecodeError:
        raise SettingsError(f"{what} is not text (UTF-8); use hex or base64.") from None
    if not secret:
        raise SettingsError(f"{what} is empty; a secret has at least {SECRET_BYTES_MIN} bytes.")
    if len(secret) < SECRET_BYTES_MIN:
        raise SettingsError(f"{what} has {len(secret)} bytes; it must have at least {SECRET_BYTES_MIN}.")
    return secret
