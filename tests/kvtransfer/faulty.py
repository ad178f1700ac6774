"""A transport that does everything wrong which a link or a process can do wrong, by a seeded plan.

It is inproc with faults in between: what it writes is dropped, delayed, duplicated, reordered, cut short, corrupted, or
lands when everybody has forgotten it; it stalls and breaks; and a whole process's end of it goes dead. One thing it
keeps, because the hardware does: the receiver's `settle` returns only when nothing is on its way any more.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from kvtransfer.connection import CLOSED, MeasuredConnection
from kvtransfer.inproc import InprocHub, InprocReceiver
from kvtransfer.interface import Offer, Region
from kvtransfer.metrics import TransferMetrics
from kvtransfer.port import Place, Port, Transport
from kvtransfer.tickets import Ticket

TRANSPORT = "inproc"
DELAY_S_MAX = 0.02
LATE_S_MAX = 0.2
"""More than the tests' SETTLE_TIMEOUT_S."""


class Kind(Enum):
    """What happens to a write, or to a fence."""

    DROP = "it never lands, or is not waited for"
    DELAY = "it takes its time"
    DUPLICATE = "it lands, and once more later"
    REORDER = "it lands after those that come after it, at the fence"
    LATE = "it lands after the fence that should have waited for it"
    TRUNCATE = "its end never lands"
    CORRUPT = "a bit is flipped on the way"
    TORN = "its writer breaks down, and rubbish lands later"
    STALL = "it never ends"
    BREAK = "the connection breaks"


@dataclass(frozen=True, slots=True)
class Fault:
    kind: Kind
    first: int
    last: int
    """Which of the request's writes and fences, counted from 0 over all attempts."""
    delay_s: float


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """What befalls one request's transfers."""

    seed: int
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, seed: int) -> "FaultPlan":
        rng = Random(seed)
        return cls(seed, tuple(_fault(rng) for _ in range(rng.choice((1, 1, 2, 3)))))

    def at(self, operation: int) -> Fault | None:
        return next((fault for fault in self.faults if fault.first <= operation <= fault.last), None)


def _fault(rng: Random) -> Fault:
    kind, first = rng.choice(tuple(Kind)), int(rng.expovariate(1 / 6))
    last = first + rng.choice((0, 0, 0, 2, 10, 1000))
    is_late = kind in (Kind.LATE, Kind.TORN, Kind.DUPLICATE)
    return Fault(kind, first, last, rng.uniform(0, LATE_S_MAX if is_late else DELAY_S_MAX))


@dataclass(frozen=True, slots=True)
class Cargo:
    """What one write carries: `slices[kv][i]` goes to `target[i]`, as far as it reaches."""

    layer: int
    target: tuple[BlockId, ...]
    slices: tuple[tuple[bytes, ...], tuple[bytes, ...]]

    @classmethod
    def load(cls, region: Region, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> "Cargo":
        keys, values = (tuple(bytes(region.readable(layer, kv, block, 1)) for block in source) for kv in (0, 1))
        return cls(layer, tuple(target), (keys, values))

    def land(self, region: Region) -> None:
        for kv, slices in enumerate(self.slices):
            for block, data in zip(self.target, slices, strict=True):
                view = region.writable(self.layer, kv, block, 1)
                view[: len(data)] = data
                region.written(self.layer, kv, block, 1, view)

    def changed(self, change: Callable[[int, int, bytes], bytes]) -> "Cargo":
        keys, values = (
            tuple(change(kv, index, data) for index, data in enumerate(slices)) for kv, slices in enumerate(self.slices)
        )
        return Cargo(self.layer, self.target, (keys, values))

    def truncated(self, rng: Random) -> "Cargo":
        last_kv, last_index = rng.randrange(2), rng.randrange(len(self.target))

        def change(kv: int, index: int, data: bytes) -> bytes:
            if (kv, index) == (last_kv, last_index):
                return data[: rng.randrange(len(data))]
            return data if (kv, index) < (last_kv, last_index) else b""

        return self.changed(change)

    def corrupted(self, rng: Random) -> "Cargo":
        place = rng.randrange(2), rng.randrange(len(self.target))

        def change(kv: int, index: int, data: bytes) -> bytes:
            if (kv, index) != place:
                return data
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(flipped)

        return self.changed(change)

    def rubbish(self, rng: Random) -> "Cargo":
        return self.changed(lambda kv, index, data: rng.randbytes(len(data)))  # noqa: ARG005


@dataclass(slots=True)
class Injector:
    """One request's faults, as they come."""

    plan: FaultPlan
    operations: int = 0
    on_operation: Callable[[int], object] | None = None

    def next(self) -> Fault | None:
        number = self.operations
        self.operations += 1
        if self.on_operation is not None:
            self.on_operation(number)
        return self.plan.at(number)


@dataclass(eq=False)
class Faults:
    """Everything faulty of one process: what is planned, what happened, what is still on its way."""

    injectors: dict[str, Injector] = field(default_factory=dict)
    """By request id; requests without one, such as links' self-tests, go undisturbed."""
    happened: Counter[Kind] = field(default_factory=Counter)
    dead: list[Region] = field(default_factory=list)
    """Of processes that were killed: nothing of theirs moves any more."""
    ticket_ids: dict[bytes, RequestId] = field(default_factory=dict, repr=False)
    """By secret."""
    _limbo: dict[bytes, set["asyncio.Task[None]"]] = field(default_factory=dict)

    def plan(self, request_id: str, plan: FaultPlan) -> Injector:
        injector = self.injectors[request_id] = Injector(plan)
        return injector

    def injector(self, ticket_id: RequestId) -> Injector | None:
        return self.injectors.get(ticket_id.split("/")[0])

    def send_later(self, secret: bytes, cargo: Cargo, region: Region, delay_s: float) -> None:
        """It lands, whatever became of the ticket."""

        async def land() -> None:
            await asyncio.sleep(delay_s)
            cargo.land(region)

        self._limbo.setdefault(secret, set()).add(asyncio.create_task(land()))

    async def all_landed(self, secret: bytes) -> None:
        """Of one ticket, which takes nothing new."""
        while pending := {landing for landing in self._limbo.get(secret, ()) if not landing.done()}:
            await asyncio.wait(pending)
        self._limbo.pop(secret, None)

    async def settle(self) -> None:
        """Nothing is on its way any more."""
        for secret in tuple(self._limbo):
            await self.all_landed(secret)

    @property
    def transport(self) -> Transport:
        return Transport(self._make_port)

    def _make_port(self, place: Place) -> Port:
        receiver = FaultyReceiver(self, place.hub, place.region)
        return Port(receiver, FaultySender(self, place.hub, place.region, place.metrics))


class FaultyReceiver(InprocReceiver):
    def __init__(self, faults: Faults, hub: InprocHub, region: Region) -> None:
        super().__init__(hub, region)
        self._faults = faults
        self._secrets: dict[RequestId, list[bytes]] = {}

    def open(self, request_id: RequestId, blocks: Sequence[BlockId]) -> Sequence[Offer]:
        (offer,) = super().open(request_id, blocks)
        self._faults.ticket_ids[offer.descriptor] = request_id
        self._secrets.setdefault(request_id, []).append(offer.descriptor)
        return (offer,)

    async def settle(self, request_id: RequestId) -> None:
        for secret in self._secrets.get(request_id, ()):
            await self._faults.all_landed(secret)
        self._secrets.pop(request_id, None)


class FaultySender:
    transport = TRANSPORT

    def __init__(self, faults: Faults, hub: InprocHub, region: Region, metrics: TransferMetrics) -> None:
        self._faults, self._hub, self._region, self._metrics = faults, hub, region, metrics

    async def connect(self, offer: Offer, layout: KVLayout) -> "FaultyConnection":
        door = self._hub.doors.get(offer.descriptor)
        if door is None or door.region.layout != layout:
            raise TransferError("The ticket is closed.")
        injector = self._faults.injector(self._faults.ticket_ids[offer.descriptor])
        return FaultyConnection(self._region, door.region, door.ticket, self._metrics, self._faults, injector)

    async def close(self) -> None:
        """Nothing to do: connections hold nothing."""


class FaultyConnection(MeasuredConnection):
    transport = TRANSPORT

    def __init__(
        self,
        source: Region,
        target: Region,
        ticket: Ticket,
        metrics: TransferMetrics,
        faults: Faults,
        injector: Injector | None,
    ) -> None:
        super().__init__(source, target.layout, metrics)
        self._region, self._ticket, self._faults, self._injector = target, ticket, faults, injector
        self._rng = Random(f"{injector.plan.seed} {injector.operations}") if injector else Random(0)
        self._reordered: list[Cargo] = []
        self._stopped = asyncio.Event()

    # ---- what a connection does

    async def _write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        self._ticket.check(target)
        cargo = Cargo.load(self._source, layer, source, target)
        fault = await self._next_fault()
        if fault is None or not await self._goes_wrong(fault, cargo):
            self._land(cargo)
        await asyncio.sleep(0)

    async def _fence(self) -> None:
        fault = await self._next_fault()
        if fault is not None and fault.kind is Kind.DROP:
            for cargo in self._reordered:
                self._send_later(cargo, fault)
        else:
            for cargo in reversed(self._reordered):
                self._land(cargo)
        self._reordered.clear()
        self._ticket.check(())

    def _interrupt(self) -> None:
        self._stopped.set()

    def _release(self) -> None:
        """What was held back goes with it."""
        self._reordered.clear()

    # ---- what goes wrong with it

    async def _next_fault(self) -> Fault | None:
        fault = self._injector.next() if self._injector else None
        if any(region is self._source for region in self._faults.dead):
            await self._stall()
        if fault is not None:
            self._faults.happened[fault.kind] += 1
            await self._hinder(fault)
        return fault

    async def _hinder(self, fault: Fault) -> None:
        """What befalls writes and fences alike."""
        match fault.kind:
            case Kind.DELAY:
                await asyncio.sleep(fault.delay_s)
            case Kind.STALL:
                await self._stall()
            case Kind.BREAK:
                raise TransferError("The connection broke.")

    async def _stall(self) -> None:
        await self._stopped.wait()
        raise TransferError(CLOSED)

    async def _goes_wrong(self, fault: Fault, cargo: Cargo) -> bool:
        """Whether the write does not land as it should."""
        match fault.kind:
            case Kind.DROP:
                return True
            case Kind.DUPLICATE:
                self._send_later(cargo, fault)
                return False
            case Kind.REORDER:
                self._reordered.append(cargo)
            case Kind.LATE:
                self._send_later(cargo, fault)
            case Kind.TRUNCATE:
                self._land(cargo.truncated(self._rng))
            case Kind.CORRUPT:
                self._land(cargo.corrupted(self._rng))
            case Kind.TORN:
                self._send_later(cargo.rubbish(self._rng), fault)
                raise TransferError("The writer broke down.")
            case _:
                return False
        return True

    def _land(self, cargo: Cargo) -> None:
        if self._stopped.is_set():
            raise TransferError(CLOSED)
        self._ticket.check(())
        cargo.land(self._region)

    def _send_later(self, cargo: Cargo, fault: Fault) -> None:
        self._ticket.check(())
        self._faults.send_later(self._ticket.secret, cargo, self._region, fault.delay_s)
