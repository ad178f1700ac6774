"""What the sending side makes of a receiver's answers, however the bytes are cut."""

import asyncio
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import TransferError
from kvtransfer.control import Fault
from kvtransfer.tcp.answers import LOST, Answers
from kvtransfer.tcp.wire import Header, Kind

CHALLENGE = Header(Kind.CHALLENGE, 0).pack() + b"c" * 16
WELCOME = Header(Kind.WELCOME, 5, count=1).pack() + b"w" * 32


def ack(count: int) -> bytes:
    return Header(Kind.ACK, 5, count=count).pack()


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_answers_come_however_the_bytes_are_cut(pieces: list[int]) -> None:
    async def scenario() -> None:
        answers, sizes = Answers(), cycle(pieces)
        said, expected = CHALLENGE + WELCOME + ack(2), [(Kind.WELCOME, 1), (Kind.ACK, 2)]
        bodies = [answers.challenge]
        while said:
            if bodies[-1].done() and expected:
                bodies.append(answers.expect(*expected.pop(0)))
            size = 1 if len(bodies) < 3 else next(sizes)
            answers.heard(said[:size])
            said = said[size:]
        assert [await body for body in bodies] == [b"c" * 16, b"w" * 32, b""]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (ack(1), "nobody asked for"),
        (WELCOME, "nobody asked for"),
        (CHALLENGE + CHALLENGE, "nobody asked for"),
        (b"HTTP/1.1 400 Bad Request", "nobody asked for"),
        (Header(Kind.SLICES, 5).pack(), "nobody asked for"),
        (Header(Kind.ERROR, 5, count=99).pack(), "nobody asked for"),
        (Header(Kind.ERROR, 5, count=Fault.TICKET_CLOSED).pack(), "has closed the ticket"),
    ],
)
def test_what_was_not_asked_for_ends_it(said: bytes, reason: str) -> None:
    async def scenario() -> None:
        answers, told = Answers(), []
        answers.when_failed(lambda: told.append(answers.failure))
        answers.heard(said)
        assert len(told) == 1
        with pytest.raises(TransferError, match=reason):
            answers.check()
        answers.heard(ack(1) * 1000)
        answers.lost()
        assert told == [answers.failure]
        assert not answers._unread

    asyncio.run(scenario())


def test_a_wrong_count_is_no_answer() -> None:
    async def scenario() -> None:
        answers = Answers()
        answers.heard(CHALLENGE)
        fenced = answers.expect(Kind.ACK, 4)
        answers.heard(ack(3))
        with pytest.raises(TransferError, match="nobody asked for"):
            await fenced

    asyncio.run(scenario())


def test_a_failure_is_told_to_who_asks_later_too() -> None:
    async def scenario() -> None:
        answers, told = Answers(), []
        answers.lost()
        answers.when_failed(lambda: told.append(answers.failure))
        assert told == [LOST]
        with pytest.raises(TransferError, match="closed the connection"):
            await answers.challenge
        with pytest.raises(TransferError, match="closed the connection"):
            answers.expect(Kind.ACK, 1)

    asyncio.run(scenario())


@settings(deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=20))
def test_garbage_raises_nothing_and_is_not_kept(garbage: list[bytes]) -> None:
    async def scenario() -> None:
        answers = Answers()
        for data in garbage:
            answers.heard(data)
            assert len(answers._unread) <= Header.FORMAT.size + 32

    asyncio.run(scenario())
