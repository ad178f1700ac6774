"""The model's tokenizer and chat template, and threads to run them on when a text is long."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from tokenizers import decoders
from transformers import AutoTokenizer

from baton.errors import InvalidRequest, SettingsError
from router.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")

INLINE_CHARACTERS_MAX = 2048
"""Shorter texts are tokenized on the event loop: that takes half a millisecond, and a thread would delay more."""
TEXT_THREADS = 2


class Tokenizer:
    """One model's. Thread-safe, the detokenizers apart."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._special_ids = _special_ids(tokenizer, self._backend)
        self._byte_of = _byte_alphabet() if self._is_byte_level() else {}
        self._spoken = _TokenBytes(self.token_bytes, silent=self._special_ids)
        self._written = _TokenBytes(self.token_bytes, silent=frozenset())

    @classmethod
    def load(cls, directory: Path, *, trust_remote_code: bool = False) -> "Tokenizer":
        """Raises SettingsError if the directory holds no tokenizer that can be loaded."""
        try:
            return cls(AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trust_remote_code))
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"The tokenizer in {directory} cannot be loaded: {reason}") from None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if self._backend is None:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:  # of the library's ways to encode, only a batch lets other threads run meanwhile
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids = encoding.ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens are written out; ids without a token make no text."""
        if self._backend is None:
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        else:
            text = self._backend.decode(tokens, skip_special_tokens=False)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True, preceding: Sequence[int] = ()) -> Detokenizer:
        if self._decodes_bytes():
            token_bytes = self._spoken if skip_special_tokens else self._written
            return ByteDetokenizer(token_bytes.__getitem__, preceding)
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return WindowDetokenizer(self.decode, lambda token: token in skipped or not self._is_known(token), preceding)

    def token_bytes(self, token: int) -> bytes:
        """What the token stands for, even where that is part of a character."""
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        if self._byte_of and all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return self.decode([token]).encode()

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model's own template writes it; tokenize it without adding special tokens.

        Raises InvalidRequest if the model has no template, or it refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest("This model has no chat template; use /v1/completions instead.", "messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(template_arguments or {}),
            )
        except jinja2.TemplateError as error:  # the template's own refusal, or a field that it misses
            raise InvalidRequest(f"The model's chat template refuses these messages: {error}", "messages") from None
        except (ValueError, TypeError, KeyError, IndexError):
            raise InvalidRequest("The model's chat template cannot render these messages.", "messages") from None
        return text

    def _is_known(self, token: int) -> bool:
        """Models often have more ids than their tokenizers have tokens."""
        known = self._tokenizer.convert_ids_to_tokens if self._backend is None else self._backend.id_to_token
        return known(token) is not None

    def _is_byte_level(self) -> bool:
        decoder = getattr(self._backend, "decoder", None)
        return decoder is not None and b"ByteLevel" in decoder.__getstate__()

    def _decodes_bytes(self) -> bool:
        """Whether a text's bytes are those of its tokens, and nothing else is done to them."""
        return isinstance(getattr(self._backend, "decoder", None), decoders.ByteLevel)


class _TokenBytes(dict[int, bytes]):
    """What each token adds to the text, worked out once: no larger than the vocabulary."""

    def __init__(self, token_bytes: Callable[[int], bytes], silent: Collection[int]) -> None:
        super().__init__()
        self._token_bytes, self._silent = token_bytes, silent

    def __missing__(self, token: int) -> bytes:
        self[token] = found = b"" if token in self._silent else self._token_bytes(token)
        return found


class TextThreads:
    """Runs text work off the event loop when the text is long.

    At most TEXT_THREADS texts are worked on at once; how many wait is bounded by the requests admitted.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")

    async def run(self, characters: int, work: Callable[[], T]) -> T:
        if characters <= INLINE_CHARACTERS_MAX:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def _special_ids(tokenizer: Any, backend: Any) -> frozenset[int]:
    if backend is None:
        return frozenset(tokenizer.all_special_ids)
    return frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones for themselves, the
    others for the next unused code points from 256 on (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
