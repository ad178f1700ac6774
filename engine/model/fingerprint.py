"""A model's fingerprint: equal means that KV computed by one process can be used by another."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SAMPLE_BYTES = 4096
_HEADER_BYTES_MAX = 100 * 2**20
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def fingerprint(directory: Path, config: dict[str, Any], dtype: str) -> str:
    """Hex digest of the configuration, the dtype it runs in and the identity of its weights.

    Of the weights it reads every tensor's name, dtype, shape and place, and its first, middle and last
    4 KiB: seconds for hundreds of gigabytes. Other weights of the same architecture differ; a change
    that spares all samples (a patch to the inside of one tensor) would go unnoticed.
    """
    digest = hashlib.sha256()
    facts = {name: value for name, value in config.items() if name not in _VOLATILE}
    digest.update(json.dumps([facts, dtype], sort_keys=True, default=str).encode())
    for file in sorted(directory.glob("*.safetensors")):
        for part in _samples(file):
            digest.update(part)
    return digest.hexdigest()[:32]


def _samples(file: Path) -> Iterator[bytes]:
    """A safetensors file: 8 bytes of header length, a JSON header, then the tensors end to end."""
    with file.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), _HEADER_BYTES_MAX)
        header = stream.read(length)
        yield header
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name in sorted(tensors):
            begin, end = tensors[name]["data_offsets"]
            for offset in _sample_offsets(begin, end):
                stream.seek(8 + length + offset)
                yield stream.read(min(_SAMPLE_BYTES, end - offset))


def _sample_offsets(begin: int, end: int) -> tuple[int, ...]:
    if end - begin <= 3 * _SAMPLE_BYTES:
        return tuple(range(begin, end, _SAMPLE_BYTES))
    return (begin, (begin + end) // 2, end - _SAMPLE_BYTES)
