import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_model import save_text_model
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoTokenizer

from baton.errors import InvalidRequest, SettingsError
from router.text.detokenizer import Detokenizer, WindowDetokenizer
from router.text.prompts import PromptEncoder
from router.text.tokenizer import INLINE_CHARACTERS_MAX, TextThreads, Tokenizer

VOCABULARY = 400


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("text-model"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def stream(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    return [*map(detokenizer.feed, tokens), detokenizer.flush()]


@settings(deadline=None)
@example(tokens=[96, 321, 321, 321, 321], skip=False)  # half a character, then ids without a token
@given(tokens=st.lists(st.integers(0, VOCABULARY + 5), max_size=40), skip=st.booleans())
def test_pieces_join_to_the_decoded_whole_whatever_the_tokens(
    tokenizer: Tokenizer, directory: Path, tokens: list[int], skip: bool
) -> None:
    whole = AutoTokenizer.from_pretrained(directory).decode(tokens, skip_special_tokens=skip)
    assert "".join(stream(tokenizer.detokenizer(skip_special_tokens=skip), tokens)) == whole
    assert "".join(stream(window_detokenizer(tokenizer, skip), tokens)) == whole


@settings(deadline=None)
@given(text=st.text(st.sampled_from("héllo 你好世界😀👩‍🚀 \n"), max_size=20), cut=st.integers(0, 60))
def test_a_text_goes_on_where_its_context_ends_even_within_a_character(
    tokenizer: Tokenizer, text: str, cut: int
) -> None:
    tokens = tokenizer.encode(text)
    preceding, following = tokens[:cut], tokens[cut:]
    expected = text[len(tokenizer.decode(preceding).rstrip("\ufffd")) :]
    for detokenizer in (tokenizer.detokenizer(preceding=preceding), window_detokenizer(tokenizer, True, preceding)):
        assert "".join(stream(detokenizer, following)) == expected


def window_detokenizer(tokenizer: Tokenizer, skip: bool, preceding: Sequence[int] = ()) -> WindowDetokenizer:
    """The one for any decoder, also where the byte-level one would do."""

    def is_silent(token: int) -> bool:
        return not tokenizer.token_bytes(token) or (skip and tokenizer.is_special(token))

    return WindowDetokenizer(tokenizer.decode, is_silent, preceding)


@settings(deadline=None)
@given(text=st.text(st.sampled_from("héllo 你好世界😀👩‍🚀 \n"), max_size=60))
def test_no_piece_of_a_real_text_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer.detokenizer(), tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_make_a_character_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    (invalid,) = (token for token in range(VOCABULARY) if tokenizer.token_bytes(token) == b"\xff")
    for detokenizer in (tokenizer.detokenizer(), window := window_detokenizer(tokenizer, skip=True)):
        pieces = [detokenizer.feed(invalid) for _ in range(1000)]
        assert sum(map(len, pieces)) >= 996
    assert len(window._window) < 10


def test_text_continues_what_precedes_it() -> None:
    """A sentencepiece decoder drops the space before the first token only."""
    words = ["▁the", "▁cat", "▁sat"]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="▁the"))
    backend.decoder = decoders.Metaspace()

    def decode(tokens: Sequence[int]) -> str:
        text: str = backend.decode(tokens)
        return text

    assert stream(WindowDetokenizer(decode), [1, 2]) == ["cat", " sat", ""]
    assert stream(WindowDetokenizer(decode, preceding=[0]), [1, 2]) == [" cat", " sat", ""]


def test_byte_fallback_characters_come_whole() -> None:
    text = "a你好😀b"
    pieces = ["a", *(f"<0x{byte:02X}>" for byte in "你好😀".encode()), "b"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.WordLevel(vocabulary, unk_token="a"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokens = [vocabulary[piece] for piece in pieces]
    streamed = stream(WindowDetokenizer(lambda ids: str(backend.decode(ids))), tokens)
    assert "".join(streamed) == text
    assert {len(piece) for piece in streamed} <= {0, 1}


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_encoding_is_the_librarys_own(tokenizer: Tokenizer, directory: Path, text: str) -> None:
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(directory)(text)["input_ids"]


def test_a_tokens_bytes_are_exact_even_within_a_character(tokenizer: Tokenizer) -> None:
    text = "naïve 😀 你"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(VOCABULARY + 100) == b""


def test_chat_is_rendered_by_the_models_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages) == "<user>Hi</><assistant>"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "<user>Hi</>"
    assert tokenizer.render_chat(messages, template_arguments={"shout": True}) == "<user>Hi</><assistant>!"
    unfinished = [*messages, {"role": "assistant", "content": "Well"}]
    continued = tokenizer.render_chat(unfinished, add_generation_prompt=False, continue_final_message=True)
    assert continued == "<user>Hi</><assistant>Well"


def test_a_template_that_refuses_says_why(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="No pirates"):
        tokenizer.render_chat([{"role": "pirate", "content": "Arr"}])


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    plain = Tokenizer.load(save_text_model(tmp_path, chat_template=None))
    with pytest.raises(InvalidRequest, match="no chat template"):
        plain.render_chat([{"role": "user", "content": "Hi"}])


def test_a_directory_without_a_tokenizer_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be loaded"):
        Tokenizer.load(tmp_path)


def test_long_texts_leave_the_loop_and_tokenize_the_same(tokenizer: Tokenizer) -> None:
    text = "hello 😀 " * INLINE_CHARACTERS_MAX

    async def main() -> tuple[int, ...]:
        threads = TextThreads()
        try:
            return await PromptEncoder(tokenizer, threads, len(text) * 4).encode(text)
        finally:
            threads.close()

    assert list(asyncio.run(main())) == tokenizer.encode(text)


def test_too_long_a_text_is_refused_with_both_numbers(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        threads = TextThreads()
        try:
            encoder = PromptEncoder(tokenizer, threads, 10)
            assert await encoder.encode("ä" * 5)
            with pytest.raises(InvalidRequest, match=r"12 bytes.* 10 at most"):
                await encoder.encode("ä" * 6)
        finally:
            threads.close()

    asyncio.run(main())


def test_the_router_needs_no_torch() -> None:
    """In a process where torch cannot be imported."""
    program = "import sys; sys.modules['torch'] = None; import router.app"
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", program], check=True, timeout=60)
