"""The names of things, as types: mixing two of them up is a type error."""

import secrets
from hashlib import sha256
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
BlockId = NewType("BlockId", int)
"""A block's place in one worker's pool: 0 to blocks - 1."""
BlockHash = NewType("BlockHash", bytes)
"""A block's content: 16 bytes that name its tokens and everything before them."""
TenantTag = NewType("TenantTag", bytes)
"""Whose blocks these are, where a name would say too much: 8 bytes."""


def tenant_tag(tenant: str) -> TenantTag:
    return TenantTag(sha256(tenant.encode()).digest()[:8])


def new_request_id() -> RequestId:
    return RequestId(f"req-{secrets.token_hex(12)}")


def new_worker_id(role: str) -> WorkerId:
    return WorkerId(f"{role}-{secrets.token_hex(4)}")
