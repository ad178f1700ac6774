"""Whatever goes wrong on the way of the blocks: the right tokens, one outcome, and every block back in its pool."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from baton.cluster.redis_server import EmbeddedRedis
from baton.errors import TransferError
from baton.ids import BlockId, RequestId
from baton.sampling import SamplingParams
from decode_worker import fence as fence_module
from decode_worker import prefill_client
from kvtransfer.interface import Connection
from kvtransfer.link.proof import UnknownLink
from kvtransfer.registry import Ports
from prefill_worker import job as job_module
from tests.decode_worker.pair import AT_ONCE_S, TIMEOUT_S, Answer, Pair, running_pair, until
from tests.engine.tiny_models import make_model, random_prompt, reference

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = random_prompt(150)
Run = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("transfer-faults"))


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[int]:
    return reference(model, PROMPT, 8)


@pytest.fixture
def with_pair(model: Path, redis_server: EmbeddedRedis, key_prefix: str) -> Run:
    def run(test: Callable[[Pair], Awaitable[None]], **settings: Any) -> None:
        settings = {"transports": ("inproc",), **settings}

        async def main() -> None:
            async with running_pair(model, redis_server.url, key_prefix, **settings) as pair:
                await test(pair)
                await pair.until_idle()
                for worker in (pair.prefill, pair.decode):
                    await worker._host.engine.call(lambda engine: engine.check_integrity())

        asyncio.run(main())

    return run


class Wrapped:
    """A connection that a test interferes with."""

    def __init__(self, inner: Connection) -> None:
        self.inner = inner
        self.writes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        self.writes += 1
        await self.inner.write(layer, source, target)


def wrap_connections(pair: Pair, wrap: Callable[[Connection], Any]) -> list[Any]:
    """Those of tickets, from now on."""
    book, made = pair.prefill._host.link_book, list[Any]()
    connect = book.connect

    async def connect_wrapped(*arguments: Any) -> Any:
        made.append(wrap(await connect(*arguments)))
        return made[-1]

    book.connect = connect_wrapped  # type: ignore[method-assign]
    return made


def flipping(pair: Pair, times: int) -> Callable[[Connection], Wrapped]:
    """One bit in the first block of each of the first so many writes that hold a whole layer's first block."""

    class Flipping(Wrapped):
        async def write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
            await super().write(layer, source, target)
            nonlocal times
            if layer == 1 and times:
                times -= 1
                pair.decode._host.engine.region.writable(1, 1, target[0], 1)[3] ^= 4

    return Flipping


def of_decode(pair: Pair, name: str, **labels: str) -> float:
    value = pair.decode._host.registry.get_sample_value(name, labels)
    assert value is not None
    return value


def is_apart(answer: Answer) -> bool:
    assert answer.error == ""
    return answer.timeline.prefill_worker != ""


def test_a_flipped_bit_is_caught_and_the_block_sent_again(with_pair: Run, tokens: list[int]) -> None:
    async def test(pair: Pair) -> None:
        wrap_connections(pair, flipping(pair, times=1))
        answer = await pair.ask(PROMPT, GREEDY)
        assert is_apart(answer)
        assert answer.token_ids == tokens
        assert of_decode(pair, "baton_kv_blocks_verified_total", result="mismatch") == 1
        assert of_decode(pair, "baton_kv_blocks_verified_total", result="match") == 19
        assert of_decode(pair, "baton_kv_blocks_resent_total") == 1

    with_pair(test)


def test_the_digests_go_on_with_the_blocks(with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        assert is_apart(await pair.ask(PROMPT, GREEDY))
        known = await pair.decode._host.engine.call(lambda engine: engine._digests.known())
        digests = {block: digest for block, digest in known.items() if digest is not None}
        assert len(digests) >= len(PROMPT) // 8, "those of all whole blocks of the prompt, without digesting them again"
        blocks = list(digests)
        assert list(pair.decode._host.engine.region.digests(blocks)) == list(digests.values())

    with_pair(test)


def test_a_block_that_stays_wrong_is_computed_here(with_pair: Run, tokens: list[int]) -> None:
    async def test(pair: Pair) -> None:
        wrap_connections(pair, flipping(pair, times=1000))
        answer = await pair.ask(PROMPT, GREEDY)
        assert not is_apart(answer)
        assert answer.token_ids == tokens

    with_pair(test)


def test_without_verification_nobody_looks(with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        wrap_connections(pair, flipping(pair, times=1000))
        assert is_apart(await pair.ask(PROMPT, GREEDY))
        assert of_decode(pair, "baton_kv_blocks_verified_total", result="skipped") == 19

    with_pair(test, verify="never")


def test_blocks_are_verified_while_later_chunks_are_computed(with_pair: Run, tokens: list[int]) -> None:
    async def test(pair: Pair) -> None:
        wrap_connections(pair, Wrapped)
        verified = asyncio.Event()
        verifier = pair.decode._remote_prefill._client._verifier
        mismatches = verifier.mismatches

        async def telling(*arguments: Any) -> list[int]:
            found = await mismatches(*arguments)
            verified.set()
            return found

        verifier.mismatches = telling  # type: ignore[method-assign]
        engine = pair.prefill._host.engine
        steps = 0

        def held(engine: Any) -> None:
            step = engine.step

            def until_verified() -> Any:
                nonlocal steps
                steps += 1
                if steps == 3:  # the first told that it was admitted, the second computed a chunk
                    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(verified.wait(), TIMEOUT_S), loop)
                    future.result()
                return step()

            engine.step = until_verified

        loop = asyncio.get_running_loop()
        await engine.call(held)
        answer = await pair.ask(PROMPT, GREEDY)
        assert is_apart(answer)
        assert answer.token_ids == tokens
        assert steps >= 5

    with_pair(test)


@pytest.mark.parametrize("send", ["streamed", "after_prefill"])
@pytest.mark.parametrize("verify", ["always", "sampled", "never"])
def test_every_way_of_sending_and_verifying(with_pair: Run, tokens: list[int], send: str, verify: str) -> None:
    async def test(pair: Pair) -> None:
        answer = await pair.ask(PROMPT, GREEDY)
        assert is_apart(answer)
        assert answer.token_ids == tokens

    with_pair(test, verify=verify, prefill={"send": send}, cluster_secret="a secret of the cluster")


def test_a_worker_with_another_secret_is_not_trusted(with_pair: Run, tokens: list[int]) -> None:
    async def test(pair: Pair) -> None:
        answer = await pair.ask(PROMPT, GREEDY)
        assert not is_apart(answer)
        assert answer.token_ids == tokens

    with_pair(test, cluster_secret="a secret of the cluster", prefill={"cluster_secret": "a secret of another one"})


@pytest.mark.parametrize("field", ["deadline_s", "first_block"])
def test_a_ticket_that_was_changed_on_the_way_is_refused(with_pair: Run, tokens: list[int], field: str) -> None:
    async def test(pair: Pair) -> None:
        client = pair.decode._remote_prefill._client
        prefill = client.prefill

        async def tampering(address: str, ticket: Any, cancelled: Any) -> Any:
            setattr(ticket, field, getattr(ticket, field) + 1)
            return await prefill(address, ticket, cancelled)

        client.prefill = tampering  # type: ignore[method-assign]
        answer = await pair.ask(PROMPT, GREEDY)
        assert not is_apart(answer)
        assert answer.token_ids == tokens

    with_pair(test, cluster_secret="a secret of the cluster")


def test_an_unknown_link_is_made_anew_within_the_request(with_pair: Run, tokens: list[int]) -> None:
    async def test(pair: Pair) -> None:
        book = pair.prefill._host.link_book
        check, asked = book.check, []

        def forgetful(ticket: Any) -> Any:
            asked.append(ticket.link.link_id)
            if len(asked) == 1:
                raise UnknownLink
            return check(ticket)

        book.check = forgetful  # type: ignore[method-assign]
        answer = await pair.ask(PROMPT, GREEDY)
        assert is_apart(answer)
        assert answer.token_ids == tokens
        assert len(set(asked)) == 2

    with_pair(test)


@pytest.mark.parametrize("where", ["write", "fence"])
def test_a_transfer_that_fails_half_way_is_computed_here(with_pair: Run, tokens: list[int], where: str) -> None:
    class Failing(Wrapped):
        async def write(self, *arguments: Any) -> None:
            if where == "write" and self.writes == 5:
                raise TransferError("The cable is cut.")
            await super().write(*arguments)

        async def fence(self) -> None:
            if where == "fence" and self.writes > 5:
                raise TransferError("The cable is cut.")
            await self.inner.fence()

    async def test(pair: Pair) -> None:
        wrap_connections(pair, Failing)
        answer = await pair.ask(PROMPT, GREEDY)
        assert not is_apart(answer)
        assert answer.token_ids == tokens

    with_pair(test)


class Stalling(Wrapped):
    """Moves nothing after some writes; ends when it is closed."""

    async def write(self, *arguments: Any) -> None:
        if self.writes == 5:
            await asyncio.Event().wait()
        await super().write(*arguments)


def test_a_stalled_link_is_given_up(with_pair: Run, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "STALL_TIMEOUT_S", 0.1)

    async def test(pair: Pair) -> None:
        wrap_connections(pair, Stalling)
        answer = await pair.ask(PROMPT, GREEDY)
        assert not is_apart(answer)
        assert answer.token_ids == tokens

    with_pair(test)


def test_a_request_cancelled_on_a_stalled_link_lets_go_at_once(with_pair: Run) -> None:
    async def test(pair: Pair) -> None:
        made = wrap_connections(pair, Stalling)
        request_id = await pair.stream.submit(PROMPT, GREEDY, [pair.prefill.address])
        await until(lambda: bool(made) and made[0].writes == 5)
        await pair.stream.cancel(request_id)
        await pair.until_idle(AT_ONCE_S)

    with_pair(test)


class HeldBack:
    """The decode worker's ports, whose tickets settle when the event is set."""

    def __init__(self, ports: Ports) -> None:
        self._ports, self.settled = ports, asyncio.Event()

    def close_ticket(self, request_id: RequestId) -> None:
        self._ports.close_ticket(request_id)

    async def settle(self, request_id: RequestId) -> None:
        await self.settled.wait()
        await self._ports.settle(request_id)


def held_back(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    monkeypatch.setattr(fence_module, "SETTLE_TIMEOUT_S", 0.05)
    fence = pair.decode._remote_prefill.fence
    fence._ports = held = HeldBack(pair.decode._host.ports)
    return held.settled


def test_blocks_that_somebody_may_still_write_into_are_not_used_until_they_settle(
    with_pair: Run, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(pair: Pair) -> None:
        settled = held_back(pair, monkeypatch)
        answer = await pair.stream.ask(PROMPT, GREEDY, [pair.prefill.address] * 2)
        assert not is_apart(answer), "both attempts ended unsettled"
        assert answer.token_ids == tokens
        quarantined = 2 * 19
        assert of_decode(pair, "baton_kv_blocks_quarantined") == quarantined
        assert pair.decode.info.load.kv_blocks_used == quarantined
        again = await pair.stream.ask(PROMPT[:100], GREEDY)
        assert again.error == ""
        assert pair.decode.info.load.kv_blocks_used == quarantined, "nobody else gets them"
        settled.set()
        await pair.until_idle()
        assert of_decode(pair, "baton_kv_blocks_quarantined") == 0

    with_pair(test)


def test_a_cancelled_request_leaves_its_unsettled_blocks_behind(
    with_pair: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(pair: Pair) -> None:
        settled = held_back(pair, monkeypatch)
        made = wrap_connections(pair, Stalling)
        request_id = await pair.stream.submit(PROMPT, GREEDY, [pair.prefill.address])
        await until(lambda: bool(made) and made[0].writes == 5)
        await pair.stream.cancel(request_id)
        await until(lambda: of_decode(pair, "baton_kv_blocks_quarantined") == 19)
        await asyncio.wait_for(pair.decode._idle.wait(), AT_ONCE_S)
        assert pair.decode.info.load.kv_blocks_used == 19
        settled.set()
        await pair.until_idle()

    with_pair(test)


def test_a_prefill_worker_that_answers_nothing_any_more_is_left(
    with_pair: Run, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job is stuck where even the end of the stream does not reach it at once."""
    monkeypatch.setattr(prefill_client, "RELEASE_TIMEOUT_S", 0.1)

    async def test(pair: Pair) -> None:
        pair.decode._remote_prefill._client._timeout_s = 0.2
        freed = asyncio.Event()

        class Stuck(Stalling):
            async def close(self) -> None:
                await freed.wait()
                await self.inner.close()

        wrap_connections(pair, Stuck)
        answer = await pair.ask(PROMPT, GREEDY)
        assert not is_apart(answer)
        assert answer.token_ids == tokens
        freed.set()

    with_pair(test)
