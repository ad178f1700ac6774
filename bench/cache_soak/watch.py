"""Looks at the workers while they are under load: are the tiers within their limits, and does anything grow?"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import grpc.aio
import psutil

from baton.rpc import events_pb2, worker_pb2, worker_pb2_grpc
from baton.service import CHANNEL_OPTIONS

PERIOD_S = 1.0
STATUS_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds."""

    rss_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        process = psutil.Process(pid)
        return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


@dataclass(slots=True)
class Watch:
    """`looks` times; `over_limit` counts tiers that held more than they may."""

    processes: Mapping[str, int]
    """Process ids by name."""
    looks: int = 0
    missed: int = 0
    """Looks at a worker, or a process, that was not there or did not answer."""
    over_limit: int = 0
    turned_off: set[str] = field(default_factory=set)
    footprints: dict[str, list[Footprint]] = field(default_factory=dict)
    statuses: dict[str, worker_pb2.CacheStatus] = field(default_factory=dict)
    """The last of each worker."""

    async def run(self, addresses: Mapping[str, str], until: asyncio.Event) -> None:
        """Once a second, and once more at the end."""
        async with AsyncExitStack() as stack:
            stubs = {}
            for name, address in addresses.items():
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, CHANNEL_OPTIONS))
                stubs[name] = worker_pb2_grpc.WorkerStub(channel)
            while not until.is_set():
                await self._look(stubs)
                try:
                    async with asyncio.timeout(PERIOD_S):
                        await until.wait()
                except TimeoutError:
                    continue
            await self._look(stubs)

    async def _look(self, stubs: Mapping[str, worker_pb2_grpc.WorkerStub]) -> None:
        request = worker_pb2.GetCacheStatusRequest(top_prefixes=3)
        self.looks += 1
        for name, stub in stubs.items():
            try:
                self.statuses[name] = await stub.GetCacheStatus(request, timeout=STATUS_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                self.missed += 1
            else:
                self._note(name, self.statuses[name])
        for name, pid in self.processes.items():
            try:
                self.footprints.setdefault(name, []).append(Footprint.of(pid))
            except psutil.Error:
                self.missed += 1

    def _note(self, name: str, status: worker_pb2.CacheStatus) -> None:
        self.over_limit += sum(tier.bytes > tier.bytes_max or tier.blocks > tier.blocks_max for tier in status.tiers)
        self.turned_off |= {f"{name} {tier_name(tier.tier)}" for tier in status.tiers if tier.off_reason}

    def hit_tokens(self) -> Mapping[str, int]:
        """By tier, over all workers; and those that came from other workers."""
        found: dict[str, int] = {}
        for status in self.statuses.values():
            for tier in status.tiers:
                found[tier_name(tier.tier)] = found.get(tier_name(tier.tier), 0) + tier.hit_tokens
            found["peer"] = found.get("peer", 0) + status.fetched_tokens
        return found

    def growth(self, name: str) -> tuple[Footprint, Footprint]:
        """A process's medians over the second tenth of the time, when it is warm, and over the last."""
        seen = self.footprints.get(name) or [Footprint(0, 0, 0)]
        tenth = max(1, len(seen) // 10)
        return _middle(seen[tenth : 2 * tenth] or seen), _middle(seen[-tenth:])


def tier_name(tier: "events_pb2.Tier") -> str:
    return events_pb2.Tier.Name(tier).removeprefix("TIER_").lower()


def _middle(footprints: Sequence[Footprint]) -> Footprint:
    middle = len(footprints) // 2
    return Footprint(
        sorted(footprint.rss_bytes for footprint in footprints)[middle],
        sorted(footprint.descriptors for footprint in footprints)[middle],
        sorted(footprint.threads for footprint in footprints)[middle],
    )
