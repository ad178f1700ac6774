"""Proofs, tickets' signatures and replays: pure."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfer_rig import SOURCE_LAYOUT, TARGET_LAYOUT

from baton.errors import Unauthorized
from baton.rpc import transfer_pb2, worker_pb2
from baton.rpc.convert import layout_to_proto
from kvtransfer.link.proof import (
    REPLAY_WINDOW,
    Purpose,
    SignedTicket,
    TicketChecker,
    TicketSigner,
    UsedNumbers,
    check_proof,
    prove,
    session_key,
    transcript,
)

SECRET = b"s" * 32
LINK_ID = b"l" * 16


def hello() -> transfer_pb2.LinkHello:
    return transfer_pb2.LinkHello(
        version=1,
        worker_id="decode-0",
        nonce=b"d" * 32,
        fingerprint="f",
        layout=layout_to_proto(TARGET_LAYOUT),
        transports=["shm", "tcp"],
    )


def challenge() -> transfer_pb2.LinkChallenge:
    return transfer_pb2.LinkChallenge(
        worker_id="prefill-0", nonce=b"p" * 32, layout=layout_to_proto(SOURCE_LAYOUT), proof=b"any"
    )


def test_a_proof_is_good_for_its_secret_and_purpose_alone() -> None:
    said = transcript(hello(), challenge())
    proof = prove(SECRET, Purpose.SENDER, said)
    check_proof(SECRET, Purpose.SENDER, said, proof)
    for secret, purpose in ((b"t" * 32, Purpose.SENDER), (SECRET, Purpose.RECEIVER), (None, Purpose.SENDER)):
        with pytest.raises(Unauthorized):
            check_proof(secret, purpose, said, proof)
    with pytest.raises(Unauthorized):
        check_proof(SECRET, Purpose.SENDER, said, b"")


def test_open_mode_takes_empty_proofs_and_no_others() -> None:
    check_proof(None, Purpose.SENDER, b"said", prove(None, Purpose.SENDER, b"said"))
    assert session_key(None, b"said") is None
    with pytest.raises(Unauthorized, match="has a cluster secret and this one has none"):
        check_proof(None, Purpose.SENDER, b"said", prove(SECRET, Purpose.SENDER, b"said"))


def _set(field: str, value: object) -> Callable[..., None]:
    return lambda message: setattr(message, field, value)


@pytest.mark.parametrize(
    "change",
    [
        _set("worker_id", "decode-1"),
        _set("nonce", b"e" * 32),
        _set("fingerprint", "g"),
        _set("wants_digests", True),
        lambda message: setattr(message.layout, "blocks", 31),
        lambda message: message.transports.reverse(),
    ],
)
def test_proofs_cover_all_that_the_receiver_said(change: Callable[[transfer_pb2.LinkHello], None]) -> None:
    other = hello()
    change(other)
    assert transcript(other, challenge()) != transcript(hello(), challenge())


@pytest.mark.parametrize(
    "change",
    [
        _set("worker_id", "prefill-1"),
        _set("nonce", b"q" * 32),
        lambda message: setattr(message.layout, "dtype", "float16"),
    ],
)
def test_proofs_cover_all_that_the_sender_said(change: Callable[[transfer_pb2.LinkChallenge], None]) -> None:
    other = challenge()
    change(other)
    assert transcript(hello(), other) != transcript(hello(), challenge())


def test_what_one_said_cannot_be_taken_for_what_the_other_said() -> None:
    keys = {session_key(SECRET, said) for said in (transcript(hello(), challenge()), b"", b"\0")}
    assert len(keys) == 3


# ---- tickets


def ticket() -> worker_pb2.Ticket:
    signed = worker_pb2.Ticket(request_id="r", prompt=[1, 2, 3], blocks=[4, 5], deadline_s=3)
    signed.sampling.logit_bias.update({5: 1.0, 1: 2.0, 9: 3.0})
    return signed


@pytest.mark.parametrize("key", [None, b"k" * 32])
@pytest.mark.parametrize("made", [ticket(), transfer_pb2.FetchTicket(request_id="r", names=[b"n"])])
def test_a_signed_ticket_is_taken_once_also_after_its_way(key: bytes | None, made: SignedTicket) -> None:
    checker = TicketChecker(key)
    TicketSigner(LINK_ID, key).sign(made)
    arrived = type(made).FromString(made.SerializeToString())
    checker.check(arrived)
    with pytest.raises(Unauthorized, match="used before"):
        checker.check(arrived)


@pytest.mark.parametrize(
    "change",
    [
        _set("request_id", "s"),
        _set("cache_salt", "x"),
        _set("first_block", 1),
        lambda message: message.blocks.append(6),
        lambda message: message.offers.add(transport="shm"),
        lambda message: setattr(message.link, "number", 2),
        lambda message: setattr(message.link, "link_id", b"m" * 16),
        lambda message: setattr(message.link, "proof", b""),
    ],
)
def test_a_changed_ticket_is_refused(change: Callable[[worker_pb2.Ticket], None]) -> None:
    changed = ticket()
    TicketSigner(LINK_ID, b"k" * 32).sign(changed)
    change(changed)
    with pytest.raises(Unauthorized, match="not signed"):
        TicketChecker(b"k" * 32).check(changed)


def test_a_refused_ticket_uses_up_no_number() -> None:
    checker, signed = TicketChecker(b"k" * 32), ticket()
    TicketSigner(LINK_ID, b"k" * 32).sign(signed)
    forged = ticket()
    TicketSigner(LINK_ID, b"another key").sign(forged)
    with pytest.raises(Unauthorized):
        checker.check(forged)
    checker.check(signed)


def test_a_ticket_of_one_kind_is_none_of_the_other() -> None:
    """However their fields are numbered."""
    signed = worker_pb2.Ticket(request_id="r")
    TicketSigner(LINK_ID, b"k" * 32).sign(signed)
    fetch = transfer_pb2.FetchTicket(request_id="r", link=signed.link)
    with pytest.raises(Unauthorized):
        TicketChecker(b"k" * 32).check(fetch)


# ---- replays


@given(st.lists(st.integers(1, 300), max_size=80))
def test_within_the_window_each_number_is_taken_once_in_any_order(numbers: list[int]) -> None:
    used, seen = UsedNumbers(), set[int]()
    for number in numbers:
        assert used.take(number) == (number not in seen)
        seen.add(number)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30))
def test_no_number_is_ever_taken_twice(numbers: list[int]) -> None:
    used = UsedNumbers()
    taken = [number for number in numbers if used.take(number)]
    assert len(set(taken)) == len(taken) and 0 not in taken
    assert not any(used.take(number) for number in taken)


def test_a_number_from_before_the_window_counts_as_used() -> None:
    used = UsedNumbers()
    assert used.take(REPLAY_WINDOW + 1)
    assert used.take(2) and not used.take(1)
    assert used.take(10 * REPLAY_WINDOW) and not used.take(9 * REPLAY_WINDOW)
