"""The sender's side of a link in the making: it answers the receiver, and tries the transports on it."""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from baton.clock import Clock
from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2
from baton.rpc.convert import layout_to_proto
from kvtransfer.interface import Offer, Region, Source
from kvtransfer.link.conversation import LINK_TIMEOUT_S, PROBE_TIMEOUT_S, Conversation, shortened
from kvtransfer.link.identity import NONCE_BYTES, LinkIdentity, check_hello
from kvtransfer.link.metrics import LinkMetrics
from kvtransfer.link.probe import Measured, Prober, digest_of
from kvtransfer.link.proof import Purpose, check_proof, prove, session_key, transcript
from kvtransfer.port import AS_THEY_LIE
from kvtransfer.reblocked import Reblocked
from kvtransfer.registry import Ports

log = logging.getLogger(__name__)

SenderConversation: TypeAlias = "Conversation[transfer_pb2.LinkResponse, transfer_pb2.LinkRequest]"


@dataclass(frozen=True, slots=True)
class Guest:
    """A receiver that has proved who it is."""

    worker_id: str
    layout: KVLayout
    transports: tuple[str, ...]
    key: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Chosen:
    transport: str
    measured: Measured
    failures: tuple[str, ...]
    """Of the better ones, each with its name."""


class _TestFailed(Exception):
    """The transport does not work between the two; the message is a sentence."""


class LinkSender:
    def __init__(
        self,
        ports: Ports,
        me: LinkIdentity,
        secret: bytes | None,
        makes_digests: bool,
        metrics: LinkMetrics,
        clock: Clock,
    ) -> None:
        self._ports, self._me, self._secret = ports, me, secret
        self._makes_digests, self._metrics, self._clock = makes_digests, metrics, clock

    async def welcome(self, conversation: SenderConversation) -> Guest:
        """Raises Unauthorized for one that does not hold the cluster's secret, UnsupportedModel for one with which KV
        cannot be shared."""
        hello = (await conversation.hear("hello")).hello
        layout = check_hello(hello, self._me, makes_digests=self._makes_digests)
        challenge = transfer_pb2.LinkChallenge(
            worker_id=self._me.worker_id,
            nonce=secrets.token_bytes(NONCE_BYTES),
            layout=layout_to_proto(self._me.layout),
        )
        said = transcript(hello, challenge)
        challenge.proof = prove(self._secret, Purpose.SENDER, said)
        await conversation.say(transfer_pb2.LinkResponse(challenge=challenge))
        answer = (await conversation.hear("answer")).answer
        check_proof(self._secret, Purpose.RECEIVER, said, answer.proof)
        return Guest(hello.worker_id, layout, tuple(hello.transports), session_key(self._secret, said))

    async def choose(self, conversation: SenderConversation, guest: Guest) -> Chosen:
        """The first of the transports that both have, in the receiver's order, that carries bytes there. Raises
        TransferError with all reasons if none does."""
        common = self._common(guest.transports)
        fit = [name for name in common if self._fits(name, guest)]
        failures = [f"{name}: {AS_THEY_LIE}" for name in common if name not in fit]
        for transport in fit:
            try:
                measured = await self._test(conversation, transport, guest)
            except _TestFailed as failure:
                failures.append(f"{transport}: {failure}")
                self._metrics.test_failed(transport)
            else:
                return Chosen(transport, measured, tuple(failures))
        raise TransferError(self._none_works(guest, failures))

    def _common(self, transports: Sequence[str]) -> Sequence[str]:
        return [name for name in dict.fromkeys(transports) if name in self._ports.transports]

    def _fits(self, transport: str, guest: Guest) -> bool:
        if self._me.layout.is_compatible(guest.layout) or self._ports.converts(transport):
            return True
        log.info("%s is not tried for the link to %s: %s", transport, guest.worker_id, AS_THEY_LIE)
        return False

    def _none_works(self, guest: Guest, failures: Sequence[str]) -> str:
        between = f"between {self._me.worker_id} and {guest.worker_id}"
        if failures:
            return f"No KV transport works {between}. {' '.join(failures)}"
        theirs, mine = ", ".join(guest.transports), ", ".join(self._ports.transports)
        return f"No KV transport is allowed and installed on both ends {between}: {mine} here, {theirs} there."

    async def _test(self, conversation: SenderConversation, transport: str, guest: Guest) -> Measured:
        await conversation.say(_try(transport))
        probe = (await conversation.hear("probe", within_s=LINK_TIMEOUT_S)).probe
        if probe.WhichOneof("outcome") != "offer" or probe.offer.transport != transport:
            raise _TestFailed(shortened(probe.failure) or "The receiver made no offer.")
        try:
            measured, digest = await self._probe(Offer(transport, probe.offer.descriptor), guest.layout)
        except _TestFailed as failure:
            await conversation.say(transfer_pb2.LinkResponse(probed=transfer_pb2.LinkProbed(failure=str(failure))))
            raise
        probed = transfer_pb2.LinkProbed(digest=digest, latency_s=measured.latency_s, bytes_per_s=measured.bytes_per_s)
        await conversation.say(transfer_pb2.LinkResponse(probed=probed))
        verified = (await conversation.hear("verified")).verified
        if verified.failure:
            raise _TestFailed(shortened(verified.failure))
        return measured

    async def _probe(self, offer: Offer, layout: KVLayout) -> tuple[Measured, int]:
        """What was measured, and the digest of what was written."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return await self._write_and_measure(offer, layout)
        except TransferError as error:
            raise _TestFailed(shortened(str(error))) from None
        except TimeoutError:
            raise _TestFailed(f"The self-test was not done within {PROBE_TIMEOUT_S:g} s.") from None
        except Exception as error:  # a transport's library may fail in any way; the next one may work
            log.warning("the self-test of %s failed", offer.transport, exc_info=True)
            raise _TestFailed(f"The self-test failed ({type(error).__name__}).") from None

    async def _write_and_measure(self, offer: Offer, layout: KVLayout) -> tuple[Measured, int]:
        source, block = _probe_source(self._ports.region, layout)
        connection = await self._ports.connect(RequestId("link"), [offer], layout)
        try:
            if source is not self._ports.region:
                connection.read_from(source)
            measured = await Prober(connection, block, layout, self._clock).measure()
        finally:
            await connection.close()
        return measured, await digest_of(source, block)


def _probe_source(region: Region, target: KVLayout) -> tuple[Source, BlockId]:
    """What the receiver's probe block is filled from: this worker's, cut to the receiver's size where that is
    another."""
    own = region.layout
    if own.is_compatible(target):
        return region, own.probe_source
    tokens = min(own.block_tokens, target.block_tokens)
    return Reblocked(region, [own.probe_source], tokens, target), BlockId(0)


def _try(transport: str) -> transfer_pb2.LinkResponse:
    response = transfer_pb2.LinkResponse()
    getattr(response, "try").transport = transport  # a word of Python's
    return response
