"""The links that this worker receives by: made at first use, shared, and made anew when they broke."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import grpc.aio

from baton.clock import Clock, monotonic
from baton.errors import BatonError, Unavailable
from baton.rpc import transfer_pb2, transfer_pb2_grpc
from kvtransfer.link.conversation import LINK_TIMEOUT_S, Conversation
from kvtransfer.link.failures import TimedOut, explain, failure_kind
from kvtransfer.link.identity import LinkIdentity
from kvtransfer.link.metrics import LinkMetrics, OpenLink
from kvtransfer.link.proof import SignedTicket
from kvtransfer.link.receiver import LinkReceiver, Made
from kvtransfer.registry import Ports

log = logging.getLogger(__name__)

LINKS_MAX = 1024
BEGUN_MAX = 32
"""Being made at one time, past which none is begun that nobody waits for."""
IDLE_S = 900.0
"""A link that no ticket was signed for this long is closed."""
UNREACHABLE_S = 0.5
REFUSED_S = 5.0
"""So long a failure is answered again: of a worker that could not be reached, and of one that said no or nothing."""
WITHIN_ONE_MACHINE = frozenset({"inproc", "shm"})
"""It is no news that these do not lead to another one."""
LinkCall: TypeAlias = "grpc.aio.StreamStreamCall[transfer_pb2.LinkRequest, transfer_pb2.LinkResponse]"
ChannelTo = Callable[[str], Awaitable[grpc.aio.Channel]]


class Link:
    """To one sender, proved and tested. Good while `is_up`."""

    def __init__(self, address: str, made: Made, call: LinkCall, clock: Clock) -> None:
        self.address, self.transport, self.worker_id = address, made.transport, made.worker_id
        self.measured = made.measured
        self.is_up = True
        self._signer, self._call, self._clock = made.signer, call, clock
        self.used_s = clock()

    def sign(self, ticket: SignedTicket) -> None:
        """Fills in the ticket's `link`, last of all its fields: nothing of it may change afterwards. Each signature is
        good for one call."""
        self.used_s = self._clock()
        self._signer.sign(ticket)

    def close(self) -> None:
        """Idempotent."""
        self.is_up = False
        self._call.cancel()

    async def ended(self, idle_s: float) -> None:
        """Returns when the stream has ended, at the latest when nobody has used the link for `idle_s`."""
        reading = asyncio.ensure_future(self._call.read())
        try:
            while not reading.done():
                left_s = self.used_s + idle_s - self._clock()
                if left_s <= 0:
                    break
                await asyncio.wait({reading}, timeout=left_s)
        finally:
            self.close()
            await asyncio.wait({reading})
            if not reading.cancelled():
                reading.exception()  # however it ended


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BatonError
    until_s: float


class Links:
    """The receiver's side: one link per sender, by its gRPC address."""

    def __init__(
        self,
        ports: Ports,
        me: LinkIdentity,
        secret: bytes | None,
        wants_digests: bool,
        channel: ChannelTo,
        metrics: LinkMetrics,
        on_measured: Callable[[int, float], None],
        clock: Clock = monotonic,
        bytes_per_s_min: float = 0.0,
        idle_s: float = IDLE_S,
    ) -> None:
        self._receiver = LinkReceiver(ports, me, secret, wants_digests, metrics)
        self._channel, self._metrics, self._on_measured, self._clock = channel, metrics, on_measured, clock
        self._bytes_per_s_min, self._idle_s = bytes_per_s_min, idle_s
        self._up: dict[str, Link] = {}
        self._making: dict[str, asyncio.Task[Link]] = {}
        self._failures: dict[str, _Failure] = {}
        self._holding: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._up)

    async def to(self, address: str) -> Link:
        """Whoever asks while it is being made gets the same one. Within LINK_TIMEOUT_S and what it takes to notice.

        Raises Unavailable if the worker cannot be reached or is too busy, TransferError if it refused or no transport
        works, Unauthorized if the two do not hold the same secret; the same again for a short while.
        """
        if link := self.present(address):
            return link
        if error := self._remembered(address):
            raise error
        making = self._making.get(address) or self._start(address)
        await asyncio.wait({making})
        if making.cancelled():
            raise Unavailable("This worker is shutting down.")
        return making.result()

    def present(self, address: str) -> Link | None:
        """The one that is up: for who cannot wait for one to be made."""
        link = self._up.get(address)
        if link is None or not link.is_up:
            return None
        link.used_s = self._clock()
        return link

    def begin(self, address: str) -> None:
        """Has one made that nobody waits for, unless it is there, is being made, has failed a short while ago, or
        BEGUN_MAX are being made."""
        if address in self._making or len(self._making) >= BEGUN_MAX or self.present(address):
            return
        if self._remembered(address) is None:
            self._start(address).add_done_callback(partial(_tell, address))

    def _start(self, address: str) -> asyncio.Task[Link]:
        making = self._making[address] = asyncio.create_task(self._make(address))
        making.add_done_callback(lambda made: self._made(address, made))
        return making

    def _made(self, address: str, making: asyncio.Task[Link]) -> None:
        del self._making[address]
        if not making.cancelled():
            making.exception()  # whoever waits raises it; perhaps nobody does any more

    def drop(self, address: str, link: Link | None = None) -> None:
        """Ends the link there, which does not hold any more; if one is named, only that one."""
        present = self._up.get(address)
        if present is not None and link in (None, present):
            present.close()

    async def close(self) -> None:
        """Idempotent."""
        self._is_closed = True
        while tasks := {*self._making.values(), *self._holding}:  # one that is made by now goes on to be held
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    # ---- failures

    def _remembered(self, address: str) -> BatonError | None:
        """Why none is made now."""
        if self._is_closed:
            return Unavailable("This worker is shutting down.")
        failure = self._failures.get(address)
        if failure is None:
            return None
        if self._clock() < failure.until_s:
            return type(failure.error)(str(failure.error))
        del self._failures[address]
        return None

    def _remember(self, address: str, error: BatonError) -> None:
        while len(self._failures) >= LINKS_MAX:
            del self._failures[next(iter(self._failures))]
        is_brief = isinstance(error, Unavailable) and not isinstance(error, TimedOut)
        for_s = UNREACHABLE_S if is_brief else REFUSED_S
        self._failures[address] = _Failure(error, self._clock() + for_s)

    # ---- one link

    async def _make(self, address: str) -> Link:
        """Raises what `to` does."""
        self._metrics.attempted("receive")
        try:
            link, opened = await self._handshake(address)
        except BatonError as error:
            self._metrics.failed(failure_kind(error))
            self._remember(address, error)
            raise
        self._make_room()
        self._up[address] = link
        holding = asyncio.create_task(self._hold(link, opened))
        self._holding.add(holding)
        holding.add_done_callback(self._holding.discard)
        return link

    async def _handshake(self, address: str) -> tuple[Link, OpenLink]:
        channel = await self._channel(address)
        call: LinkCall = transfer_pb2_grpc.TransferStub(channel).Link()
        conversation = Conversation(call.read, call.write, transfer_pb2.LinkResponse)
        try:
            async with asyncio.timeout(LINK_TIMEOUT_S):
                made = await self._receiver.make(conversation)
        except BaseException as error:
            explained = await explain(error, call, address)
            call.cancel()
            raise explained from None
        return Link(address, made, call, self._clock), self._opened(address, made)

    def _opened(self, address: str, made: Made) -> OpenLink:
        measured = made.measured
        for sample in measured.samples:
            self._on_measured(sample.size_bytes, sample.seconds)
        is_slow = measured.bytes_per_s < self._bytes_per_s_min if self._bytes_per_s_min else made.is_slow
        opened = OpenLink(made.transport, made.worker_id, measured.latency_s, measured.bytes_per_s, is_slow)
        _log(address, made, opened)
        return opened

    def _make_room(self) -> None:
        """Of too many the one that was used longest ago ends."""
        if len(self._up) >= LINKS_MAX:
            min(self._up.values(), key=lambda link: link.used_s).close()

    async def _hold(self, link: Link, opened: OpenLink) -> None:
        self._metrics.opened(opened)
        try:
            await link.ended(self._idle_s)
        finally:
            if self._up.get(link.address) is link:
                del self._up[link.address]
            self._metrics.closed(opened)
            log.info("the link to %s by %s has ended", link.worker_id, link.transport)


def _tell(address: str, making: asyncio.Task[Link]) -> None:
    """How one ended that nobody may have waited for."""
    if not making.cancelled() and (error := making.exception()):
        log.info("there is no link to %s: %s", address, error)


def _log(address: str, made: Made, link: OpenLink) -> None:
    where = f"{link.peer} at {address}"
    log.info("KV blocks come from %s by %s: %s", where, link.transport, link.speed)
    if made.failures:
        is_news = any(failure.split(":")[0] not in WITHIN_ONE_MACHINE for failure in made.failures)
        level = logging.WARNING if is_news else logging.INFO
        log.log(
            level, "%s is not linked by a better transport than %s: %s", where, link.transport, " ".join(made.failures)
        )
    if link.is_slow:
        log.warning("the %s link to %s is slower than it should be: %s", link.transport, where, link.speed)
