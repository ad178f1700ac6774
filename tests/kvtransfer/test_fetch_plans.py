"""Fetches under faults drawn from a seed: each ends, what it says came is right, and nobody holds anything after it."""

import asyncio
from collections.abc import Sequence
from random import Random

import pytest

from baton.errors import TransferError
from baton.ids import BlockId
from kvtransfer.fetch import sending
from kvtransfer.fetch.client import NoLink
from tests.kvtransfer.fetch_rig import HAS, Rig, rig
from tests.kvtransfer.transfer_rig import SOURCE_LAYOUT, slices

PLANS = 40
FAULTS = ("none", "wrong", "always wrong", "fails", "slow", "cancelled", "channel", "forgotten")


class Plan:
    """One fault at one of the sender's writes; `str` is what to repeat it by."""

    def __init__(self, seed: str, both: Rig) -> None:
        random = Random(seed)
        self.seed, self.both = seed, both
        self.fault = random.choice(FAULTS)
        self.at = random.randrange(3 * HAS)
        self.numbers = range(random.randrange(4), HAS + random.randrange(2))
        self.writes = 0

    async def before_write(self, layer: int, source: Sequence[BlockId]) -> Sequence[BlockId]:
        del layer
        self.writes += 1
        if self.writes <= self.at or (self.writes > self.at + 1 and self.fault != "always wrong"):
            return source
        match self.fault:
            case "wrong" | "always wrong":
                return [BlockId(15)] * len(source)
            case "fails":
                raise TransferError("The plan says so.")
            case "slow":
                await asyncio.sleep(0.01)
            case "cancelled":
                self.both.cancelled.set()
            case "channel":
                await self.both.channels.close()
        return source

    async def run(self) -> None:
        self.both.cancelled.clear()
        slices(self.both.target)[:] = 0
        self.both.book.before_write = self.before_write
        await self.both.links.to(self.both.address)
        forgotten = dict(self.both.book._links)
        if self.fault == "forgotten":
            self.both.book._links.clear()
        fetched = await self.both.fetch(self.numbers)
        self.both.book._links.update(forgotten)
        await self.both.until_let_go()
        present = [number for number in self.numbers if number < HAS]
        came = [self.both.came(number, index) for index, number in enumerate(present)]
        assert all(came[: fetched.blocks]) and fetched.settling is None, self
        assert fetched.error is not None or fetched.blocks == len(present), self
        if self.fault in ("none", "wrong", "slow"):
            assert fetched.blocks == len(present), self
        assert isinstance(fetched.error, NoLink) is (self.fault == "forgotten"), self
        before = bytes(self.both.target.memory)
        await asyncio.sleep(0)
        assert bytes(self.both.target.memory) == before, f"{self}: something landed late"

    def __str__(self) -> str:
        return f"plan {self.seed}: {self.fault} at write {self.at} of {self.numbers}"


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
def test_every_plan_ends_well(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), rig(transport) as both:
            for number in range(PLANS):
                await Plan(f"{transport}-{number}", both).run()

    monkeypatch.setattr(sending, "GROUP_BYTES_MAX", 2 * SOURCE_LAYOUT.block_bytes)
    asyncio.run(run())
