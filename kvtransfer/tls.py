"""The files that the tcp transport's TLS is made of."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Both ends show the certificate and check that the other's was signed by the authority."""

    certificate: Path
    key: Path
    authority: Path
