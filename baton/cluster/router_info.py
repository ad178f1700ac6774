"""What a router tells the other routers: where it is, and the load it has placed on each worker."""

from pydantic import BaseModel, ConfigDict

from baton.ids import WorkerId


class PlacedLoad(BaseModel):
    """What one router has placed on one worker and not seen the end of."""

    model_config = ConfigDict(frozen=True)

    prefill_tokens: int = 0
    """Prompt tokens to compute there that the worker's own reports do not show yet."""
    sequences: int = 0
    """Placed on it to decode, whether they have a token yet or not."""
    kv_tokens: int = 0
    """Of these sequences: prompt and what is generated so far."""
    remaining_tokens: int = 0
    """That these sequences are expected to generate still."""

    def __add__(self, other: "PlacedLoad") -> "PlacedLoad":
        return PlacedLoad(
            prefill_tokens=self.prefill_tokens + other.prefill_tokens,
            sequences=self.sequences + other.sequences,
            kv_tokens=self.kv_tokens + other.kv_tokens,
            remaining_tokens=self.remaining_tokens + other.remaining_tokens,
        )


class RouterInfo(BaseModel):
    model_config = ConfigDict(frozen=True)

    router_id: str
    grpc_address: str
    http_address: str
    placed: dict[WorkerId, PlacedLoad] = {}
    """By worker; only those with any load."""
