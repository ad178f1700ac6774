"""The tcp transport's TLS: which files it is made of, and what both ends demand of each other.

Both show a certificate that the authority signed, and speak TLS 1.3. Names in certificates are not checked: workers
are reached at addresses that come and go with their pods, and the authority is the cluster's own and signs nothing but
workers, so its signature says all there is to say. Which of them a peer is, the proof of the ticket says
(kvtransfer/tcp/proof.py).
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baton.errors import TransferError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Both ends show the certificate and check that the other's was signed by the authority."""

    certificate: Path
    key: Path
    authority: Path


class TlsContexts:
    """One side's context, made anew once a file has changed: certificates are renewed without a restart."""

    def __init__(self, files: TlsFiles, is_server: bool) -> None:
        self._files = files
        self._protocol = ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT
        self._made: ssl.SSLContext | None = None
        self._made_of: tuple[int, ...] = ()

    def current(self) -> ssl.SSLContext:
        """Raises TransferError, naming the file, if one cannot be used."""
        versions = tuple(map(_version, (self._files.certificate, self._files.key, self._files.authority)))
        if self._made is None or versions != self._made_of:
            self._made, self._made_of = self._make(), versions
        return self._made

    def _make(self) -> ssl.SSLContext:
        context = ssl.SSLContext(self._protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.options |= ssl.OP_NO_TICKET  # links are kept, so sessions need not be resumed
        _load(self._files.authority, lambda: context.load_verify_locations(self._files.authority))
        _load(
            self._files.key,
            lambda: context.load_cert_chain(self._files.certificate, self._files.key, password=_no_password),
        )
        return context


def _no_password() -> str:
    """Keys are not encrypted; without this OpenSSL would ask the terminal."""
    return ""


def _version(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError as error:
        raise TransferError(f"The TLS file {file} cannot be read: {error.strerror}.") from None


def _load(file: Path, load: Callable[[], None]) -> None:
    try:
        load()
    except OSError as error:  # ssl.SSLError is one
        raise TransferError(f"The TLS file {file} cannot be used: {error.strerror or error}.") from None
