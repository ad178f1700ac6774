"""Traces in Mooncake's format: one JSON object a line, with when a request came, how long its prompt and its answer
are, and what the blocks of its prompt are called.

`timestamp` is in milliseconds; `hash_ids` names each block of 512 tokens (the last one may be shorter), chained: the
same id stands for the same tokens after the same tokens. (Mooncake, FAST'25, section 4 and its trace release.)
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baton.errors import InvalidRequest
from baton.ids import BlockHash
from kvcache.block_hash import HASH_BYTES

TRACE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival_s: float
    """From the start of the trace."""
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]
    """One for each block of the prompt, the last and shorter one included."""


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)

    timestamp: float = Field(ge=0, allow_inf_nan=False)
    input_length: int = Field(ge=1)
    output_length: int = Field(ge=0)
    hash_ids: list[int]


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` lines, in the order of arrival. Raises InvalidRequest, naming the line that is wrong."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(islice(file, limit))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The trace {path} cannot be read: {error}.") from None
    requests = [_read(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise InvalidRequest(f"The trace {path} holds no request.")
    return sorted(requests, key=lambda request: request.arrival_s)


def _read(path: Path, number: int, text: str) -> TraceRequest:
    try:
        line = _Line.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise InvalidRequest(f"Line {number} of the trace {path} is wrong: {where}: {first['msg']}.") from None
    blocks = -(-line.input_length // TRACE_BLOCK_TOKENS)
    if len(line.hash_ids) != blocks:
        raise InvalidRequest(
            f"Line {number} of the trace {path} is wrong: {line.input_length} tokens are {blocks} blocks of "
            f"{TRACE_BLOCK_TOKENS}, but hash_ids names {len(line.hash_ids)}."
        )
    return TraceRequest(line.timestamp / 1000, line.input_length, max(line.output_length, 1), tuple(line.hash_ids))


def write_trace(path: Path, requests: Sequence[TraceRequest]) -> None:
    lines = (
        {
            "timestamp": round(request.arrival_s * 1000),
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            "hash_ids": request.block_ids,
        }
        for request in requests
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def at_rate(requests: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests, `rate` times as fast."""
    return [replace(request, arrival_s=request.arrival_s / rate) for request in requests]


def made_unique(requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """The same requests, but no block occurs twice: nothing can be reused."""
    ids = count()
    return [replace(request, block_ids=tuple(islice(ids, len(request.block_ids)))) for request in requests]


def hit_rate_max(requests: Sequence[TraceRequest]) -> float:
    """The share of the prompts' blocks that an infinite cache shared by all would hold: no router can do better."""
    seen: set[int] = set()
    blocks = hits = 0
    for request in requests:
        blocks += len(request.block_ids)
        hits += next((n for n, block in enumerate(request.block_ids) if block not in seen), len(request.block_ids))
        seen.update(request.block_ids)
    return hits / blocks


def prompt_block_name(block_id: int) -> BlockHash:
    """What the routers and the block pools call a block of the trace."""
    return _name(b"prompt", block_id)


def answer_block_name(request: int, block: int) -> BlockHash:
    """A block that holds generated tokens. The trace does not say which later prompt repeats them, so its name is
    like no other: it takes up room, but nobody finds it."""
    return _name(b"answer", request, block)


def _name(kind: bytes, *numbers: int) -> BlockHash:
    data = b"".join(number.to_bytes(16, "little", signed=True) for number in numbers)
    return BlockHash(blake2b(data, digest_size=HASH_BYTES, person=kind).digest())
