"""How long a request's KV is to be kept below HBM, as its sender asks for it and its tenant may."""

from dataclasses import dataclass
from math import isfinite

from baton.errors import InvalidRequest

TTL_MAX_S = 7 * 24 * 3600.0
"""A week; the same in inference.proto."""


@dataclass(frozen=True, slots=True)
class Retention:
    """`ttl_s` and `pin` are what is asked for, the rest is the tenant's."""

    ttl_s: float = 0.0
    """From the last use; 0: no promise."""
    pin: bool = False
    """Until the tenant's cache is cleared."""
    tenant: str = ""
    """Whose blocks they are, promised or not."""
    quota_bytes: int = 0
    """What the tenant may keep under a promise on each worker; 0: nothing."""

    def __post_init__(self) -> None:
        if not (isfinite(self.ttl_s) and 0 <= self.ttl_s <= TTL_MAX_S):
            raise InvalidRequest(f"cache.ttl_s must be a number of seconds from 0 to {TTL_MAX_S:.0f}.", "cache.ttl_s")

    @property
    def is_promise(self) -> bool:
        return self.pin or self.ttl_s > 0

    def owned(self, tenant: str, quota_bytes: int) -> "Retention":
        """The same for a tenant. Raises InvalidRequest if that may have nothing kept."""
        if self.is_promise and not quota_bytes:
            raise InvalidRequest(
                "Nothing may be kept by `cache` here (cache_bytes_max is 0); leave it out: what is asked for again and "
                "again is kept without it.",
                "cache",
            )
        return Retention(self.ttl_s, self.pin, tenant, quota_bytes)


NO_PROMISE = Retention()
