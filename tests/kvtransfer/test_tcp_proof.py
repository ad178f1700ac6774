"""What proves a ticket, and that nothing else does."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.tcp.proof import Greeting, Role, ticket_key
from kvtransfer.tcp.wire import Hello

GREETING = Greeting(bytes(range(16)), bytes(range(16, 32)), 3, 7, bytes(range(32, 48)))
KEY = ticket_key(b"cluster", b"t" * 16)


@pytest.mark.parametrize("role", Role)
def test_a_proof_holds_for_its_role_alone(role: Role) -> None:
    proof = GREETING.proof(role, KEY)
    assert [GREETING.is_proven(proof, other, KEY) for other in Role] == [other is role for other in Role]


@pytest.mark.parametrize(
    "other",
    [
        replace(GREETING, challenge=bytes(16)),
        replace(GREETING, nonce=bytes(16)),
        replace(GREETING, count=4),
        replace(GREETING, ticket=8),
        replace(GREETING, count=7, ticket=3),
        replace(GREETING, layout_digest=bytes(16)),
    ],
)
def test_a_proof_is_about_all_that_was_said(other: Greeting) -> None:
    assert not other.is_proven(GREETING.proof(Role.SENDER, KEY), Role.SENDER, KEY)


def test_both_secrets_make_the_key() -> None:
    keys = {ticket_key(cluster, ticket) for cluster in (None, b"a", b"b") for ticket in (b"t" * 16, b"u" * 16)}
    assert len(keys) == 6


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_a_guess_proves_nothing(guess: bytes) -> None:
    assert not GREETING.is_proven(guess, Role.SENDER, KEY)


def test_a_hello_says_what_it_said() -> None:
    hello = Hello(GREETING.nonce, GREETING.layout_digest, GREETING.proof(Role.SENDER, KEY))
    assert Hello.unpack(hello.pack()) == hello
    assert repr(hello.proof) not in repr(hello)
