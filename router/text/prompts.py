"""From what clients send to the prompt's tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from baton.errors import InvalidRequest
from router.text.tokenizer import TextThreads, Tokenizer


class PromptEncoder:
    """Long texts are tokenized on threads; too long ones are refused before any work."""

    def __init__(self, tokenizer: Tokenizer, threads: TextThreads, prompt_bytes_max: int) -> None:
        self._tokenizer, self._threads, self._prompt_bytes_max = tokenizer, threads, prompt_bytes_max

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Raises InvalidRequest if the text has more bytes than `prompt_bytes_max`."""
        self._check_bytes([text], "prompt")
        return await self._threads.run(
            len(text), lambda: tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        )

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        add_special_tokens: bool,
        template_arguments: Mapping[str, Any],
    ) -> tuple[int, ...]:
        """Raises InvalidRequest if the contents have too many bytes, or the model's template refuses them."""
        contents = [message["content"] for message in messages]
        self._check_bytes(contents, "messages")

        def work() -> tuple[int, ...]:
            text = self._tokenizer.render_chat(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_arguments=template_arguments,
            )
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

        return await self._threads.run(sum(map(len, contents)), work)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def _check_bytes(self, texts: Sequence[str], param: str) -> None:
        if sum(map(len, texts)) * 4 <= self._prompt_bytes_max:
            return  # a character has at most four bytes
        text_bytes = sum(len(text.encode()) for text in texts)
        if text_bytes > self._prompt_bytes_max:
            raise InvalidRequest(
                f"The prompt has {text_bytes} bytes of text; this server takes {self._prompt_bytes_max} at most.", param
            )
