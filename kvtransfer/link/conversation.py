"""What both ends of a link say and hear until it is ready, each step within its time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from baton.errors import DeadlineExceeded, InvalidRequest, Unavailable

STEP_TIMEOUT_S = 5.0
"""For what the other side only has to look up or to compute."""
START_TIMEOUT_S = 15.0
"""For bringing a transport up, which may load a library and look for its devices."""
PROBE_TIMEOUT_S = 8.0
"""For connecting to the other worker's region and testing the way there."""
LINK_TIMEOUT_S = 30.0
"""For the whole, with all transports that fail and all links that are tested before this one."""
REASON_CHARS_MAX = 500


class OneOf(Protocol):
    def WhichOneof(self, oneof_group: str) -> str | None: ...  # noqa: N802 - protobuf's name


Said = TypeVar("Said", bound=OneOf)
Heard = TypeVar("Heard", bound=OneOf)
Field = TypeVar("Field")


class Conversation(Generic[Said, Heard]):
    """One end of the stream, used by one task; the messages' oneof is called `message`."""

    def __init__(
        self,
        read: Callable[[], Awaitable[object]],
        write: Callable[[Said], Awaitable[None]],
        heard: type[Heard],
    ) -> None:
        self._read, self._write, self._heard = read, write, heard

    async def say(self, message: Said) -> None:
        await self._write(message)

    async def hear(self, *kinds: str, within_s: float = STEP_TIMEOUT_S) -> Heard:
        """The next message, of one of these kinds.

        Raises Unavailable if the other side ended the stream, DeadlineExceeded if it said nothing in time, which also
        ends the call, InvalidRequest if it said something else.
        """
        try:
            async with asyncio.timeout(within_s):
                message = await self._read()
        except TimeoutError:
            raise DeadlineExceeded(f"The other worker was silent for {within_s:g} s.") from None
        if not isinstance(message, self._heard):
            raise Unavailable("The other worker ended the link before it was ready.")
        if message.WhichOneof("message") not in kinds:
            raise InvalidRequest(f"The other worker did not send what follows ({' or '.join(kinds)}).")
        return message


def shortened(reason: str) -> str:
    """A failure's reason as it travels and may be logged: one line, bounded, whoever wrote it."""
    line = " ".join(reason[: 2 * REASON_CHARS_MAX].split())[:REASON_CHARS_MAX]
    return "".join(character if character.isprintable() else "?" for character in line)
