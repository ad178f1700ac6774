"""/v1/chat/completions: what is asked, as sequences; what comes, as OpenAI writes it."""

from typing import Any

from baton.errors import InvalidRequest
from baton.sampling import PositionLogprobs, TokenLogprob
from router.frontend import Order
from router.http.answer import Answer, Dialect, Json, finite
from router.http.openai_requests import ChatCompletionRequest, ChatMessage
from router.http.openai_responses import ChatChoice, ChatLogprobs, ChatText, TokenLogprobs, TopLogprob
from router.sequence import Delta, SequenceRequest


class ChatAnswer(Answer[ChatCompletionRequest]):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[Json]:
        """Who speaks, for each choice."""
        speaker: ChatText = {"role": "assistant", "content": ""}
        chunks = [self.wrap([{**_choice(index), "delta": speaker}]) for index in range(self.request.choices)]
        return [chunks[0] | self.beside_choices(), *chunks[1:]]

    def beside_choices(self) -> dict[str, Any]:
        prompt = self.generation.sequences[0].request.prompt
        return {"prompt_token_ids": list(prompt)} if self.request.return_token_ids else {}

    @property
    def shows_tokens(self) -> bool:
        return bool(self.request.return_token_ids or self.request.logprobs)

    def choice(self, index: int, delta: Delta, *, is_whole: bool) -> ChatChoice:
        choice = _choice(index, delta)
        if is_whole:
            choice["message"] = {"role": "assistant", "content": delta.text, "refusal": None}
        else:
            choice["delta"] = {"content": delta.text} if delta.text else {}
        if self.request.logprobs:
            choice["logprobs"] = self._logprobs(delta)
        if self.request.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _logprobs(self, delta: Delta) -> ChatLogprobs:
        return {"content": [self._token(position) for position in delta.logprobs], "refusal": None}

    def _token(self, position: PositionLogprobs) -> TokenLogprobs:
        """The chosen token may or may not be among the likeliest that follow it."""
        best = sorted(set(position), key=lambda token: token.logprob, reverse=True)
        likeliest = [self._entry(token) for token in best[: self.request.top_logprobs or 0]]
        return {**self._entry(position[0]), "top_logprobs": likeliest}

    def _entry(self, token: TokenLogprob) -> TopLogprob:
        tokenizer = self.served.tokenizer
        return {
            "token": tokenizer.decode([token.token_id]),
            "logprob": finite(token.logprob),
            "bytes": list(tokenizer.token_bytes(token.token_id)),
        }


def _choice(index: int, delta: Delta | None = None) -> ChatChoice:
    return {
        "index": index,
        "logprobs": None,
        "finish_reason": delta.finish_reason if delta else None,
        "stop_reason": delta.stop_reason if delta else None,
    }


async def _sequences(request: ChatCompletionRequest, order: Order) -> list[SequenceRequest]:
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    template = SequenceRequest(
        prompt=(),
        sampling=request.sampling(max_tokens=request.tokens_asked, logprobs=logprobs),
        stop=request.stop_strings,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        continues_prompt=bool(request.continue_final_message),
        cache_salt=request.cache_salt or "",
        retention=request.retention,
    )
    prompt = await order.served.prompts.encode_chat(
        [_message(index, message) for index, message in enumerate(request.messages)],
        add_generation_prompt=request.generates_new_message,
        continue_final_message=bool(request.continue_final_message),
        add_special_tokens=bool(request.add_special_tokens),
        template_arguments=request.chat_template_kwargs or {},
    )
    return order.sequences([prompt], template, request.choices)


def _message(index: int, message: ChatMessage) -> dict[str, Any]:
    """As templates expect it: text parts joined by newlines, as vLLM joins them."""
    content = message.content
    if isinstance(content, list):
        for position, part in enumerate(content):
            if part.type != "text" or part.text is None:
                path = f"messages[{index}].content[{position}]"
                raise InvalidRequest(f"{path} is not text, and this model reads nothing else.", path)
        content = "\n".join(part.text or "" for part in content)
    return {**(message.model_extra or {}), "role": message.role, "content": content or ""}


CHAT = Dialect("/chat/completions", ChatCompletionRequest, lambda request: request.choices, _sequences, ChatAnswer)
