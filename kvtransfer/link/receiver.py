"""The receiver's side of a link in the making: it introduces itself, and looks at what each transport brings."""

import asyncio
import logging
import math
import secrets
from dataclasses import dataclass, field
from typing import TypeAlias

from baton.errors import InvalidRequest, TransferError
from baton.ids import RequestId
from baton.rpc import transfer_pb2
from baton.rpc.convert import layout_to_proto
from kvtransfer.interface import Offer
from kvtransfer.link.conversation import (
    LINK_TIMEOUT_S,
    PROBE_TIMEOUT_S,
    START_TIMEOUT_S,
    STEP_TIMEOUT_S,
    Conversation,
    shortened,
)
from kvtransfer.link.identity import NONCE_BYTES, PROTOCOL_VERSION, LinkIdentity, is_worker_id
from kvtransfer.link.metrics import LinkMetrics
from kvtransfer.link.probe import Measured, clear_target, digest_of
from kvtransfer.link.proof import Purpose, TicketSigner, check_proof, prove, session_key, transcript
from kvtransfer.registry import Ports

log = logging.getLogger(__name__)

SETTLE_TIMEOUT_S = 2.0
TESTS_MAX = 16
ReceiverConversation: TypeAlias = "Conversation[transfer_pb2.LinkRequest, transfer_pb2.LinkResponse]"


@dataclass(frozen=True, slots=True)
class Host:
    """A sender that has proved who it is."""

    worker_id: str
    key: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a handshake."""

    worker_id: str
    transport: str
    measured: Measured
    is_slow: bool
    failures: tuple[str, ...]
    """Of better transports, each with its name."""
    signer: TicketSigner


class _NoOffer(Exception):
    """The transport cannot be used here; the message is a sentence."""


class LinkReceiver:
    """Makes one link at a time, or many: their tests take turns on the probe block."""

    def __init__(
        self, ports: Ports, me: LinkIdentity, secret: bytes | None, wants_digests: bool, metrics: LinkMetrics
    ) -> None:
        self._ports, self._me, self._secret = ports, me, secret
        self._wants_digests, self._metrics = wants_digests, metrics
        self._probe_block = asyncio.Lock()

    async def make(self, conversation: ReceiverConversation) -> Made:
        """Raises Unauthorized if the sender does not hold the secret, InvalidRequest if it does not keep to the
        protocol, and what the conversation raises."""
        host = await self._introduce(conversation)
        tested, failures = "", list[str]()
        for _ in range(TESTS_MAX + 1):
            response = await conversation.hear("try", "ready", within_s=LINK_TIMEOUT_S)
            if response.WhichOneof("message") == "ready":
                return self._made(host, response.ready, tested, tuple(failures))
            tested = getattr(response, "try").transport
            if tested not in self._ports.transports:
                raise InvalidRequest("The other worker tries a transport that it was not told of.")
            if failure := await self._take_test(conversation, tested):
                self._metrics.test_failed(tested)
                failures.append(f"{tested}: {failure}")
                tested = ""
        raise InvalidRequest("The other worker wants more tests than there are transports.")

    async def _introduce(self, conversation: ReceiverConversation) -> Host:
        hello = transfer_pb2.LinkHello(
            version=PROTOCOL_VERSION,
            worker_id=self._me.worker_id,
            nonce=secrets.token_bytes(NONCE_BYTES),
            fingerprint=self._me.fingerprint,
            layout=layout_to_proto(self._me.layout),
            transports=self._ports.transports,
            wants_digests=self._wants_digests,
        )
        await conversation.say(transfer_pb2.LinkRequest(hello=hello))
        challenge = (await conversation.hear("challenge")).challenge
        if len(challenge.nonce) != NONCE_BYTES or not is_worker_id(challenge.worker_id):
            raise InvalidRequest("This is no challenge of a worker.", "challenge")
        said = transcript(hello, challenge)
        check_proof(self._secret, Purpose.SENDER, said, challenge.proof)
        answer = transfer_pb2.LinkAnswer(proof=prove(self._secret, Purpose.RECEIVER, said))
        await conversation.say(transfer_pb2.LinkRequest(answer=answer))
        return Host(challenge.worker_id, session_key(self._secret, said))

    def _made(self, host: Host, ready: transfer_pb2.LinkReady, tested: str, failures: tuple[str, ...]) -> Made:
        numbers = (ready.latency_s, ready.bytes_per_s)
        if ready.transport != tested or not tested or not all(0 < x < math.inf for x in numbers):
            raise InvalidRequest("The other worker chose a transport that was not tested.")
        measured = Measured.told(ready.latency_s, ready.bytes_per_s, self._me.layout)
        return Made(host.worker_id, tested, measured, ready.is_slow, failures, TicketSigner(ready.link_id, host.key))

    # ---- one test

    async def _take_test(self, conversation: ReceiverConversation, transport: str) -> str:
        """Why the transport does not work between the two; empty: it does."""
        request_id = RequestId(f"link-{secrets.token_hex(8)}")
        async with self._probe_block:
            try:
                offer = await self._open(transport, request_id)
                probed = await self._let_write(conversation, offer)
                failure = shortened(probed.failure) or await self._compare(probed.digest)
            except _NoOffer as error:
                await conversation.say(_probe(failure=str(error)))
                return str(error)
            finally:
                await self._close(request_id)
        if not probed.failure:
            await conversation.say(transfer_pb2.LinkRequest(verified=transfer_pb2.LinkVerified(failure=failure)))
        return failure

    async def _open(self, transport: str, request_id: RequestId) -> Offer:
        """Raises _NoOffer."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._ports.start(transport)
            clear_target(self._ports.region)
            return self._ports.open(transport, request_id, [self._ports.region.layout.probe_target])
        except TransferError as error:
            raise _NoOffer(shortened(str(error))) from None
        except TimeoutError:
            raise _NoOffer(f"It did not start within {START_TIMEOUT_S:g} s.") from None
        except Exception as error:  # a transport's library may fail in any way; the next one may work
            log.warning("transport %s does not start", transport[:32], exc_info=True)
            raise _NoOffer(f"It does not start ({type(error).__name__}).") from None

    async def _let_write(self, conversation: ReceiverConversation, offer: Offer) -> transfer_pb2.LinkProbed:
        message = transfer_pb2.TransportOffer(transport=offer.transport, descriptor=offer.descriptor)
        await conversation.say(_probe(offer=message))
        return (await conversation.hear("probed", within_s=PROBE_TIMEOUT_S + STEP_TIMEOUT_S)).probed

    async def _compare(self, digest: int) -> str:
        region = self._ports.region
        if await digest_of(region, region.layout.probe_target) == digest:
            return ""
        return "What landed in the self-test is not what was sent."

    async def _close(self, request_id: RequestId) -> None:
        """A writer that is still at it could only spoil the next test."""
        self._ports.close_ticket(request_id)
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                await self._ports.settle(request_id)
        except TimeoutError:
            log.warning("a link's self-test was not settled within %g s", SETTLE_TIMEOUT_S)


def _probe(offer: transfer_pb2.TransportOffer | None = None, failure: str | None = None) -> transfer_pb2.LinkRequest:
    return transfer_pb2.LinkRequest(probe=transfer_pb2.LinkProbe(offer=offer, failure=failure))
