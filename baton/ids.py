"""The names of things, as types: mixing two of them up is a type error."""

import secrets
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
BlockId = NewType("BlockId", int)
"""A block's place in one worker's pool: 0 to blocks - 1."""
BlockHash = NewType("BlockHash", bytes)
"""A block's content: 16 bytes that name its tokens and everything before them."""


def new_request_id() -> RequestId:
    return RequestId(f"req-{secrets.token_hex(12)}")


def new_worker_id(role: str) -> WorkerId:
    return WorkerId(f"{role}-{secrets.token_hex(4)}")
