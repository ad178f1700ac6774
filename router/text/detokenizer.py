"""Turns tokens into text as they come, never splitting a character."""

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
"""What an incomplete or invalid UTF-8 sequence decodes to."""
CHARACTER_TOKENS_MAX = 4
"""A UTF-8 character has at most four bytes, and a token at least one."""
PRIMING_TOKENS = 6
_Utf8Decoder = getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """Texts from `feed` and the last one from `flush`, joined, are what all tokens fed decode to."""

    def feed(self, token: int) -> str:
        """The text that this token completes."""

    def flush(self) -> str:
        """What was held back for a character that did not come."""


class ByteDetokenizer:
    """For vocabularies whose tokens are bytes, whatever their neighbours: byte-level BPE, as most models have it.

    `bytes_of` a token that makes no text is empty. `preceding` is the text's context: what comes out continues it.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], preceding: Sequence[int] = ()) -> None:
        self._bytes_of, self._decoder = bytes_of, _Utf8Decoder("replace")
        self._decoder.decode(b"".join(map(bytes_of, preceding[-PRIMING_TOKENS:])))

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For all others.

    Decoders look at neighbours (a leading space is dropped from the first token only, a character's bytes may
    lie in several tokens), but never far: a window is decoded that starts at the previous clean end of text,
    so that the cost of a token does not grow with the text.

    Tokens that are silent make no text; `decode` must not drop any other, each of which stands for a byte or more.
    `preceding` is the text's context: what comes out then continues it, as `decode(preceding + tokens)` continues
    `decode(preceding)`. One exception: a byte-fallback decoder gives up a whole run of bytes for one that is
    invalid, also the characters in it that were sent already.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_silent: Callable[[int], bool] = lambda _: False,
        preceding: Sequence[int] = (),
    ) -> None:
        self._decode, self._is_silent = decode, is_silent
        self._window = [token for token in preceding[-PRIMING_TOKENS:] if not is_silent(token)]
        self._restart(self._window)

    def feed(self, token: int) -> str:
        if self._is_silent(token):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            piece = text[self._sent :]
            self._restart(self._window[self._clean :])
        elif len(self._window) - self._clean < CHARACTER_TOKENS_MAX:
            return ""  # the rest of the character may still come
        else:  # these bytes are no character, but the last of them may begin one
            piece = text[self._sent : -1]
            self._restart(self._window[-CHARACTER_TOKENS_MAX:])
        return piece

    def flush(self) -> str:
        return self._decode(self._window)[self._sent :]

    def _restart(self, window: list[int]) -> None:
        """Goes on with these tokens as the context, all of whose settled text was sent."""
        text = self._decode(window) if window else ""
        is_unclean = text.endswith(REPLACEMENT)
        self._window = window
        self._sent = len(text) - is_unclean
        self._clean = 0 if is_unclean else len(window)
        """How many tokens of the window make whole characters, all of them sent."""
