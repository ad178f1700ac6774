"""Router, prefill worker and decode worker as real processes, used as clients use them: OpenAI's own package,
gRPC, and all the nonsense that arrives at a public port."""

import json
import socket
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
import httpx
import openai
import pytest

from baton.client import Client
from baton.cluster.redis_server import EmbeddedRedis
from baton.errors import InvalidRequest, ModelNotFound
from baton.sampling import SamplingParams
from engine.recall.text import make_ledger, prompt, question
from tests.cluster.processes import PATIENCE_S, Process, fetch, running, until

LEDGER = make_ledger(300, seed=11)
LOCKERS = sorted(LEDGER.owners)
BLOCKS = 700
ENDLESS_TOKENS = 10_000
"""Of answers that nobody waits for: half a minute or so."""
AT_ONCE_S = 5.0
"""Far less than that, on however busy a machine."""


@dataclass(frozen=True)
class Stack:
    router: Process

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.router.http}/v1", api_key="none", max_retries=0)

    def workers(self) -> list[dict[str, Any]]:
        return list(fetch(f"{self.router.http}/v1/workers")["data"])

    def used_blocks(self) -> dict[str, int]:
        return {worker["role"]: worker["kv_blocks_used"] for worker in self.workers()}


@pytest.fixture(scope="module")
def stack(redis_server: EmbeddedRedis) -> Iterator[Stack]:
    common = {"redis_url": redis_server.url, "key_prefix": "real-stack"}
    worker = {**common, "threads": 1, "self_test": False, "kv_blocks": BLOCKS}
    with ExitStack() as exits:
        exits.enter_context(running("prefill-worker", **worker, chunk_tokens=128))
        exits.enter_context(running("decode-worker", **worker))
        router = exits.enter_context(running("router", **common, http_port=0))
        until(lambda: _is_ready(router), PATIENCE_S, "the router has found the decode worker")
        yield Stack(router)


def _is_ready(router: Process) -> bool:
    return httpx.get(f"{router.http}/health", timeout=PATIENCE_S).status_code == 200


@pytest.fixture(autouse=True)
def no_block_is_leaked(stack: Stack) -> Iterator[None]:
    """After every test free blocks equal total minus cached: none is held by a request."""
    yield
    until(lambda: set(stack.used_blocks().values()) == {0}, PATIENCE_S, "all blocks are free or cached")
    until(lambda: all(worker["reachable"] for worker in stack.workers()), PATIENCE_S, "both workers are well")
    assert {worker["role"] for worker in stack.workers()} == {"prefill", "decode"}


def chat(locker: str) -> list[Any]:
    return [{"role": "system", "content": LEDGER.text}, {"role": "user", "content": question(locker)}]


# ---- OpenAI's package


def test_openai_completions(stack: Stack) -> None:
    asked = [prompt(LEDGER, locker) for locker in LOCKERS[:3]]
    answer = stack.openai.completions.create(model="recall", prompt=asked, max_tokens=5, temperature=0, logprobs=2)
    owners = [LEDGER.owners[locker] for locker in LOCKERS[:3]]
    assert [choice.text.strip() for choice in answer.choices] == [f"{owner}." for owner in owners]
    assert all(choice.finish_reason == "stop" for choice in answer.choices)
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.tokens
    assert answer.choices[0].logprobs.tokens[0] == f" {owners[0]}"
    assert answer.usage and answer.usage.prompt_tokens > 3 * 300 * 5


def test_openai_chat_streaming(stack: Stack) -> None:
    stream = stack.openai.chat.completions.create(
        model="recall", messages=chat(LOCKERS[5]), temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == f"{LEDGER.owners[LOCKERS[5]]}."
    usage = chunks[-1].usage
    assert usage and usage.completion_tokens == 4
    assert usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens is not None


def test_openai_sees_what_is_cached(stack: Stack) -> None:
    for _ in range(2):
        answer = stack.openai.chat.completions.create(model="recall", messages=chat(LOCKERS[6]), temperature=0)
    assert answer.usage and answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens - 64


def test_openai_seed_and_n(stack: Stack) -> None:
    def ask(seed: int) -> list[str]:
        answer = stack.openai.completions.create(
            model="recall", prompt="locker", max_tokens=12, temperature=1.5, n=3, seed=seed,
            extra_body={"ignore_eos": True, "logit_bias": {str(token): 60 for token in range(20, 60)}},
        )  # fmt: skip
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    assert ask(1) == ask(1)
    assert len(set(ask(1))) == 3
    assert ask(1) != ask(4)


def test_openai_errors(stack: Stack) -> None:
    with pytest.raises(openai.NotFoundError, match="nothing-such"):
        stack.openai.completions.create(model="nothing-such", prompt="locker")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        stack.openai.completions.create(model="recall", prompt="locker", temperature=-1)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_openai_cancellation_frees_the_blocks_of_both_workers_at_once(phase: str, stack: Stack) -> None:
    fresh = make_ledger(900, seed=4)  # which nobody has cached
    body: dict[str, Any] = {
        "max_tokens": ENDLESS_TOKENS,
        "extra_body": {"ignore_eos": True},
        "temperature": 0,
        "stream": True,
    }
    if phase == "decode":
        stream = stack.openai.completions.create(model="recall", prompt=LEDGER.text, **body)
        next(iter(stream))
        assert stack.used_blocks()["decode"] > 0
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            stack.openai.with_options(timeout=0.4).completions.create(model="recall", prompt=fresh.text, **body)
    until(lambda: set(stack.used_blocks().values()) == {0}, AT_ONCE_S, "blocks are free")


# ---- gRPC


def test_grpc_client(stack: Stack) -> None:
    with Client(stack.router.grpc) as client:
        assert [(model.name, model.ready) for model in client.models()] == [("recall", True)]
        parts = list(client.generate("recall", prompt(LEDGER, LOCKERS[8]), sampling=SamplingParams(temperature=0)))
    assert "".join(part.text for part in parts).strip() == f"{LEDGER.owners[LOCKERS[8]]}."
    assert parts[-1].finish_reason == "stop"
    assert parts[-1].usage and parts[-1].usage.completion_tokens == 4
    assert parts[-1].timeline and parts[-1].timeline.decode_worker


def test_leaving_a_grpc_stream_cancels_it(stack: Stack) -> None:
    with Client(stack.router.grpc) as client:
        endless = SamplingParams(temperature=0, max_tokens=ENDLESS_TOKENS, ignore_eos=True)
        for _ in client.generate("recall", LEDGER.text, sampling=endless):
            break
        until(lambda: set(stack.used_blocks().values()) == {0}, AT_ONCE_S, "blocks are free")


def test_grpc_errors(stack: Stack) -> None:
    with Client(stack.router.grpc) as client:
        with pytest.raises(ModelNotFound, match="nothing-such"):
            list(client.generate("nothing-such", "locker"))
        with pytest.raises(InvalidRequest, match="context"):
            list(client.generate("recall", [5] * 70_000))
        with pytest.raises(InvalidRequest):
            list(client.generate("recall", [5, 4_000_000_000]))
        with pytest.raises(InvalidRequest):
            list(client.generate("recall", "locker " * 1_500_000))


@pytest.mark.parametrize("message", [b"\xff\xff\xff\xff", b"\x12\x04\xc3\x28\xa0\xa1", Random(1).randbytes(5000)])
def test_grpc_messages_that_are_none(message: bytes, stack: Stack) -> None:
    with grpc.insecure_channel(stack.router.grpc) as channel:
        call = channel.unary_stream("/baton.v1.Inference/Generate")(message)
        with pytest.raises(grpc.RpcError) as error:
            list(call)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details().endswith(".")


# ---- bad HTTP


BAD_BODIES: dict[str, bytes] = {
    "no JSON": b"{",
    "invalid UTF-8": b'{"model": "recall", "prompt": "\xc3\x28"}',
    "an array": b"[]",
    "no prompt": b'{"model": "recall"}',
    "an empty prompt": b'{"model": "recall", "prompt": []}',
    "negative max_tokens": b'{"model": "recall", "prompt": "locker", "max_tokens": -5}',
    "negative n": b'{"model": "recall", "prompt": "locker", "n": -1}',
    "negative ids": b'{"model": "recall", "prompt": [-1, 5]}',
    "ids that are none": b'{"model": "recall", "prompt": [5, 99999999999]}',
    "a number as prompt": b'{"model": "recall", "prompt": 5}',
    "an infinite temperature": b'{"model": "recall", "prompt": "locker", "temperature": 1e999}',
    "a prompt longer than the context": json.dumps({"model": "recall", "prompt": [5] * 70_000}).encode(),
    "10 MB of text": json.dumps({"model": "recall", "prompt": "locker " * 1_500_000}).encode(),
    "a model that is none": b'{"model": {"a": 1}, "prompt": "locker"}',
    "deep nesting": b'{"model": "recall", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
}


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_bad_bodies_get_a_sentence(name: str, path: str, stack: Stack) -> None:
    answer = httpx.post(
        f"{stack.router.http}/v1/{path}",
        content=BAD_BODIES[name],
        headers={"content-type": "application/json"},
        timeout=PATIENCE_S,
    )
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert error["message"].endswith((".", "!", "?")) and error["type"]


def test_bytes_that_are_no_http(stack: Stack) -> None:
    address = urllib.parse.urlsplit(stack.router.http)
    for nonsense in (
        Random(2).randbytes(3000),
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -4\r\n\r\n",
    ):
        with closing(socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)) as connection:
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert _is_ready(stack.router)
