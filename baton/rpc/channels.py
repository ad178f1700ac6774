"""gRPC channels to other workers, one per address, shared by whoever speaks to it."""

import grpc.aio

from baton.service import CHANNEL_OPTIONS

CHANNELS_MAX = 1024


class Channels:
    """Made at first use. Past CHANNELS_MAX the one that was asked for longest ago is closed, with its calls: workers
    came and went, and that one is the likeliest gone."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def to(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.pop(address, None)
        if channel is None:
            while len(self._channels) >= CHANNELS_MAX:
                await self._channels.pop(next(iter(self._channels))).close()
            channel = self._channels.get(address) or grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._channels[address] = channel
        return channel

    async def close(self) -> None:
        """Idempotent."""
        while self._channels:
            await self._channels.popitem()[1].close()
