import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fake_worker import STOP, FakeDecodeWorker, Script, failure, output, says, speaks, token_at
from generation_rig import Rig, ask, collect, generating, without_timeline

from baton.clock import monotonic
from baton.cluster.worker_info import WorkerInfo
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from baton.ids import RequestId
from baton.rpc import common_pb2, worker_pb2
from router.generation import Usage, WorkerFault
from router.sequence import Delta, SequenceRequest
from router.worker_pool import WorkerLost

UNAVAILABLE, OVERLOADED, INTERNAL = (
    worker_pb2.ERROR_KIND_UNAVAILABLE,
    worker_pb2.ERROR_KIND_OVERLOADED,
    worker_pb2.ERROR_KIND_INTERNAL,
)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def then(script: Script, tokens: int, last: Callable[[], Coroutine[Any, Any, worker_pb2.TokenOutput | None]]) -> Script:
    """The first `tokens` of the script's outputs, then something else."""

    async def cut(submit: worker_pb2.Submit) -> AsyncIterator[worker_pb2.TokenOutput]:
        count = 0
        async for each in script(submit):
            if count == tokens:
                break
            count += 1
            yield each
        if (end := await last()) is not None:
            yield end

    return cut


async def nothing() -> None:
    """The worker hangs: no finish reason comes."""


def fails(kind: int) -> Callable[[], Coroutine[Any, Any, worker_pb2.TokenOutput]]:
    async def fail() -> worker_pb2.TokenOutput:
        return failure(kind)

    return fail


def hangs_after(tokens: int) -> Script:
    return then(speaks, tokens, nothing)


def fails_after(tokens: int, kind: int = UNAVAILABLE) -> Script:
    return then(speaks, tokens, fails(kind))


async def undisturbed(directory: Path, *sequences: SequenceRequest) -> tuple[list[Delta], Usage]:
    async with generating(directory, FakeDecodeWorker(speaks, "undisturbed")) as rig:
        return await rig.run(*sequences)


VARIED = (
    ask("hello", seed=1),
    ask("hello", seed=2, choice=1, stop=("a", "xyz", "bc")),
    ask("world", seed=3, stop=("q",), include_stop=True),
    ask("你好", seed=4, sampling={"logprobs": 0}),
    ask("again", seed=5, sampling={"prompt_logprobs": 0}),
    ask("and", seed=6, skip_special_tokens=False, continues_prompt=False, stop=("ee", "zz", "k")),
)
"""Texts that end by length and by stop strings, choices of one prompt, logprobs of both kinds."""


# ---- a worker is lost


@pytest.mark.parametrize("tokens", [0, 1, 7, 19])
def test_another_worker_goes_on_where_the_lost_one_was(model_directory: Path, tokens: int) -> None:
    async def main() -> None:
        expected, expected_usage = await undisturbed(model_directory, *VARIED)
        dying, other = FakeDecodeWorker(hangs_after(tokens), "decode-1"), FakeDecodeWorker(speaks, "decode-2")
        async with generating(model_directory, dying) as rig, other:
            generation = rig.start(*VARIED)
            collecting = asyncio.create_task(collect(generation))
            await dying.until(lambda worker: len(worker.submits) == len(VARIED))
            await dying.settled()
            rig.membership.change([dying.info, other.info])
            await rig.until_usable(2)
            await dying.stop()
            deltas = await collecting
            generation.close()
            assert list(map(without_timeline, deltas)) == list(map(without_timeline, expected))
            assert generation.usage == expected_usage
            assert [list(submit.generated) for submit in other.submits] == [
                [token_at(submit, position) for position in range(tokens)] for submit in other.submits
            ]
            assert all(
                submit.sampling.HasField("prompt_logprobs") == (tokens == 0 and submit.prompt == first.prompt)
                for first in dying.submits
                for submit in other.submits
                if first.sampling.HasField("prompt_logprobs") and first.sampling.seed == submit.sampling.seed
            )
            assert rig.metric("baton_placement_retries_total") == len(other.submits)

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_texts_are_right_whatever_befalls_the_workers(model_directory: Path, seed: int) -> None:
    """Forty sequences of ten requests, on two workers that a seeded plan kills and brings back, or has refuse,
    give up and fail what they serve; at no time is any sequence failed more often than it may be."""
    chance = Random(seed)
    requests = [
        tuple(
            ask(f"prompt {number}", seed=100 * number + choice, max_tokens=chance.randint(10, 60), choice=choice)
            for choice in range(4)
        )
        for number in range(10)
    ]

    def disturbed(submit: worker_pb2.Submit) -> AsyncIterator[worker_pb2.TokenOutput]:
        faulty = [fails(UNAVAILABLE), fails(OVERLOADED), gives_up]
        if len(submit.generated) or chance.random() < 0.7:
            return speaks(submit)
        return then(speaks, chance.randint(1, 30), chance.choice(faulty))(submit)

    async def gives_up() -> worker_pb2.TokenOutput:
        return output(finish=common_pb2.FINISH_REASON_CANCELLED)

    async def kill_by_turns(rig: Rig, workers: list[FakeDecodeWorker]) -> None:
        for life in range(2, 6):
            victim = chance.choice(workers)
            goal = victim.outputs + chance.randint(20, 150)
            with contextlib.suppress(TimeoutError):
                await victim.until(lambda worker, goal=goal: worker.outputs >= goal, timeout_s=0.3)
            await victim.stop()
            victim.epoch = str(life)
            await victim.start()
            rig.membership.change([worker.info for worker in workers])
            await rig.until_usable(2)

    async def main() -> None:
        async with generating(model_directory, FakeDecodeWorker(speaks)) as rig:
            expected = [(await rig.run(*request))[0] for request in requests]
        workers = [FakeDecodeWorker(disturbed, f"decode-{number}") for number in range(2)]
        async with generating(model_directory, *workers, failover_max=6) as rig, asyncio.TaskGroup() as group:
            group.create_task(kill_by_turns(rig, workers))
            running = [
                group.create_task(rig.run(*request, request_id=RequestId(str(number))))
                for number, request in enumerate(requests)
            ]
            for task, right in zip(running, expected, strict=True):
                deltas, _ = await task
                assert list(map(without_timeline, deltas)) == list(map(without_timeline, right)), f"seed {seed}"
            assert rig.metric("baton_placement_retries_total") > 0
            assert rig.metric("baton_requests_running") == rig.metric("baton_requests_waiting") == 0
        assert not any(rig.placer.placed().values())

    run(main)


def test_a_sequence_whose_only_worker_died_waits_for_its_return(model_directory: Path) -> None:
    async def main() -> None:
        (expected,), _ = await undisturbed(model_directory, ask())
        worker = FakeDecodeWorker(hangs_after(7))
        async with generating(model_directory, worker) as rig:
            generation = rig.start(ask())
            collecting = asyncio.create_task(collect(generation))
            await worker.until(lambda worker: worker.outputs == 7)
            await worker.stop()
            rig.membership.change([])
            await rig.until_usable(0)
            worker.script, worker.epoch = speaks, "2"
            await worker.start()
            rig.membership.change([worker.info])
            (delta,) = await collecting
            assert without_timeline(delta) == without_timeline(expected)
            assert rig.attempts() == [(0, 1, "decode-1", "failed"), (0, 2, "decode-1", "finished")]
            generation.close()

    run(main)


@pytest.mark.parametrize("wait_s", [0, 0.05])
def test_it_does_not_wait_longer_than_it_may(model_directory: Path, wait_s: float) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(hangs_after(7))
        async with generating(model_directory, worker, failover_wait_s=wait_s) as rig:
            generation = rig.start(ask())
            collecting = asyncio.create_task(collect(generation))
            await worker.until(lambda worker: worker.outputs == 7)
            await worker.stop()
            with pytest.raises(WorkerLost, match="decode-1 was lost"):
                await collecting
            generation.close()

    run(main)


def test_while_one_choice_waits_the_others_go_on(model_directory: Path) -> None:
    """The first choice's worker dies with nobody else to take it; the second choice's worker is not asked to."""

    async def main() -> None:
        dying, other = FakeDecodeWorker(hangs_after(3), "decode-1"), FakeDecodeWorker(hangs_after(3), "decode-2")
        async with generating(model_directory, dying) as rig, other:
            generation = rig.start(ask())
            await dying.until(lambda worker: worker.outputs == 3)
            await dying.stop()
            for _ in range(3):
                assert await generation.next() is not None
            waiting = asyncio.create_task(generation.next())
            await rig.until_usable(0)
            await asyncio.sleep(0)
            assert not waiting.done()
            other.script = speaks
            rig.membership.change([other.info])
            assert await waiting is not None
            await collect(generation)
            generation.close()
            await dying.start()

    run(main)


def test_a_request_that_ends_while_it_waits_leaves_nothing_behind(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(hangs_after(1))
        async with generating(model_directory, worker) as rig:
            generation = rig.start(ask())
            await worker.until(lambda worker: worker.outputs == 1)
            await generation.next()
            waiting = asyncio.create_task(generation.next())
            await worker.stop()
            await rig.until_usable(0)
            waiting.cancel()
            generation.close()
            generation.close()
            worker.epoch = "2"
            await worker.start()
            rig.membership.change([worker.info])
            await rig.until_usable(1)
            await asyncio.sleep(0)
            assert len(worker.submits) == 1
            assert not any(rig.placer.placed().values())

    run(main)


def test_stopping_the_pool_ends_what_runs_and_what_waits(model_directory: Path) -> None:
    async def main() -> None:
        workers = [FakeDecodeWorker(hangs_after(1), f"decode-{number}") for number in range(2)]
        async with generating(model_directory, *workers, failover_wait_s=3600) as rig:
            generations = [rig.start(ask(), request_id=RequestId(str(number))) for number in range(4)]
            for worker in workers:
                await worker.until(lambda worker: worker.outputs == 2)
            await workers[0].stop()
            collecting = [asyncio.create_task(collect(generation)) for generation in generations]
            await rig.pool.stop()
            ends = await asyncio.gather(*collecting, return_exceptions=True)
            assert all(isinstance(end, WorkerLost) for end in ends), ends
            for generation in generations:
                generation.close()

    run(main)


# ---- a worker answers that it failed


def test_failovers_are_bounded(model_directory: Path) -> None:
    async def main() -> None:
        workers = [FakeDecodeWorker(fails_after(1), f"decode-{number}") for number in range(3)]
        async with generating(model_directory, *workers, failover_max=2) as rig:
            with pytest.raises(Unavailable, match="It went wrong"):
                await rig.run(ask())
            assert sum(len(worker.submits) for worker in workers) == 3
            assert [attempt[1:] for attempt in rig.attempts()] == [
                (number, worker, "failed") for number, (_, _, worker, _) in enumerate(rig.attempts(), 1)
            ]
            assert len({worker for _, _, worker, _ in rig.attempts()}) == 3, "who has failed it is left alone"

    run(main)


def test_the_only_worker_is_asked_again_after_its_cool_down(model_directory: Path) -> None:
    async def main() -> None:
        (expected,), _ = await undisturbed(model_directory, ask())
        worker = FakeDecodeWorker(fails_after(5))
        async with generating(model_directory, worker) as rig:
            began_s = monotonic()
            generation = rig.start(ask())
            collecting = asyncio.create_task(collect(generation))
            await worker.until(lambda worker: worker.outputs == 6)
            worker.script = speaks
            (delta,) = await collecting
            assert without_timeline(delta) == without_timeline(expected)
            assert monotonic() - began_s > 0.9
            generation.close()

    run(main)


def test_new_requests_leave_a_worker_alone_that_cools_down(model_directory: Path) -> None:
    async def main() -> None:
        bad, good = FakeDecodeWorker(fails_after(2), "decode-1"), FakeDecodeWorker(speaks, "decode-2")
        async with generating(model_directory, bad, failover_wait_s=0) as rig, good:
            with pytest.raises(Unavailable):
                await rig.run(ask())
            rig.membership.change([bad.info, good.info])
            await rig.until_usable(2)
            for number in range(10):
                await rig.run(ask(), request_id=RequestId(str(number)))
            assert len(bad.submits) == 1
            decision = rig.decisions.get(RequestId("9"))
            assert decision is not None
            (excluded,) = decision.placements[0].excluded
            assert excluded.worker == "decode-1" and "cooling down" in excluded.reason

    run(main)


def test_a_worker_on_its_own_is_used_though_it_cools_down(model_directory: Path) -> None:
    async def main() -> None:
        async with generating(model_directory, FakeDecodeWorker(fails_after(2)), failover_wait_s=0) as rig:
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await rig.run(ask())

    run(main)


@pytest.mark.parametrize(
    ("kind", "tries", "error"),
    [
        (INTERNAL, 2, WorkerFault),
        (worker_pb2.ERROR_KIND_INVALID_REQUEST, 1, InvalidRequest),
        (OVERLOADED, 4, Overloaded),
    ],
)
def test_what_is_tried_elsewhere_and_how_often(
    model_directory: Path, kind: int, tries: int, error: type[BatonError]
) -> None:
    async def main() -> None:
        workers = [FakeDecodeWorker(says([failure(kind)]), f"decode-{number}") for number in range(3)]
        async with generating(model_directory, *workers) as rig:
            with pytest.raises(error):
                await rig.run(ask())
            assert sum(len(worker.submits) for worker in workers) == tries

    run(main)


def test_a_prefill_worker_that_was_asked_in_vain_cools_down(model_directory: Path) -> None:
    async def main() -> None:
        script = says([output(5, failed_prefill_workers=["prefill-1"]), output(6, finish=STOP)])
        async with generating(model_directory, FakeDecodeWorker(script)) as rig:
            await rig.run(ask())
            assert rig.generator.cooldowns.cooling().keys() == {"prefill-1"}

    run(main)


# ---- ends


def test_a_lost_ending_is_known_by_the_tokens_themselves(model_directory: Path) -> None:
    async def unending(submit: worker_pb2.Submit) -> AsyncIterator[worker_pb2.TokenOutput]:
        yield output(*(token_at(submit, position) for position in range(submit.sampling.max_tokens)))

    stops = says([output(66, 67), output(68)])

    async def main() -> None:
        (expected,), _ = await undisturbed(model_directory, ask())
        worker = FakeDecodeWorker(unending)
        async with generating(model_directory, worker) as rig:
            (delta,), _ = await rig.run(ask())
            assert without_timeline(delta) == without_timeline(expected)
            await worker.until(lambda worker: len(worker.cancels) == 1)
            worker.script = stops
            (delta,), usage = await rig.run(ask(sampling={"stop_token_ids": (68,)}, continues_prompt=False))
            assert (delta.text, delta.finish_reason, delta.stop_reason) == ("ab", "stop", 68)
            assert usage.completion_tokens == 3

    run(main)


def test_the_deadline_travels_and_ends_the_request(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(hangs_after(2))
        async with generating(model_directory, worker, request_timeout_s=60) as rig:
            with pytest.raises(DeadlineExceeded, match="by its deadline"):
                await rig.run(ask(), deadline_s=monotonic() + 1.0)
            assert 0 < worker.submits[0].deadline_s <= 1.0
            await worker.until(lambda worker: len(worker.cancels) == 1)
            assert rig.attempts() == [(0, 1, "decode-1", "cancelled")]
            with pytest.raises(DeadlineExceeded):
                rig.start(ask(), deadline_s=monotonic() - 0.1)
            assert len(worker.submits) == 1
        async with generating(model_directory, worker, request_timeout_s=1.0) as rig:
            with pytest.raises(DeadlineExceeded, match=r"within 1 s, the most this server gives"):
                await rig.run(ask(), deadline_s=monotonic() + 60)
            assert worker.submits[-1].deadline_s <= 1.0

    run(main)


def test_the_deadline_ends_a_wait_for_a_worker(model_directory: Path) -> None:
    async def main() -> None:
        worker = FakeDecodeWorker(hangs_after(1))
        async with generating(model_directory, worker) as rig:
            generation = rig.start(ask(), deadline_s=monotonic() + 1.0)
            collecting = asyncio.create_task(collect(generation))
            await worker.until(lambda worker: worker.outputs == 1)
            await worker.stop()
            with pytest.raises(DeadlineExceeded):
                await collecting
            generation.close()

    run(main)


def test_an_id_may_be_used_twice_at_once(model_directory: Path) -> None:
    async def main() -> None:
        expected, _ = await undisturbed(model_directory, ask(seed=1), ask(seed=2))
        async with generating(model_directory, FakeDecodeWorker(speaks)) as rig:
            answers = await asyncio.gather(rig.run(ask(seed=1)), rig.run(ask(seed=2)))
            for (delta,), right in zip((deltas for deltas, _ in answers), expected, strict=True):
                assert without_timeline(delta) == without_timeline(right)
            assert rig.attempts() == [(0, 1, "decode-1", "finished")]

    run(main)


def test_without_a_worker_it_is_refused_at_once(model_directory: Path) -> None:
    async def main() -> None:
        async with generating(model_directory) as rig:
            with pytest.raises(Unavailable, match="No decode worker"):
                rig.start(ask())
            with pytest.raises(Unavailable, match="No decode worker"):
                rig.generator.facts()
            assert rig.metric("baton_requests_waiting") == 0

    run(main)


def test_only_workers_of_the_model_are_asked(model_directory: Path) -> None:
    async def main() -> None:
        own, other = FakeDecodeWorker(speaks, "decode-1"), FakeDecodeWorker(speaks, "decode-2")
        async with generating(model_directory, own) as rig, other:
            rig.membership.change([own.info, other.info.model_copy(update={"model": "other"})])
            async with asyncio.timeout(30):
                while not rig.pool.usable("other"):
                    await rig.pool.changed()
            for _ in range(5):
                await rig.run(ask())
            assert not other.submits and not rig.pool.unusable("m")

    run(main)


# ---- what is measured


def test_placements_are_counted_and_compared_with_what_came(model_directory: Path) -> None:
    def with_prefill_cost(info: WorkerInfo, token_s: float, **changes: object) -> WorkerInfo:
        prefill = replace(info.latency.prefill, token_s=token_s)
        return info.model_copy(update={"latency": replace(info.latency, prefill=prefill), **changes})

    async def main() -> None:
        worker, other = FakeDecodeWorker(speaks), FakeDecodeWorker(speaks, "prefill-1").info
        async with generating(model_directory, worker) as rig:
            await rig.run(ask())
            assert rig.metric("baton_placements_total", kind="local") == 1
            prefill = with_prefill_cost(other, 1e-6, role="prefill", address="127.0.0.1:9")
            rig.membership.change([with_prefill_cost(worker.info, 1.0), prefill])
            await rig.until_usable(2)
            await rig.run(ask("x" * 900, max_tokens=20))
            assert rig.metric("baton_placements_total", kind="pair") == 1
            (candidate,) = worker.submits[1].prefill_candidates
            assert (candidate.worker_id, candidate.address) == ("prefill-1", "127.0.0.1:9")
            for quantity in ("ttft", "itl"):
                assert rig.metric("baton_placement_prediction_error_ratio_count", quantity=quantity) == 2
            assert rig.metric("baton_placement_decision_seconds_count") == 2
            decision = rig.decisions.get(RequestId("r"))
            assert decision is not None
            (placement,) = decision.placements
            assert placement.actual.ttft_s > 0 and placement.actual.completion_tokens == 20
            assert placement.actual.outcome == "finished" and placement.prompt_tokens == 900

    run(main)


def test_a_slow_reader_does_not_hold_up_what_is_measured(model_directory: Path) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        def look() -> None:
            if not any(rig.placer.placed().values()):
                ended.set()

        async with generating(model_directory, FakeDecodeWorker(speaks), has_room=look) as rig:
            generation = rig.start(ask())
            async with asyncio.timeout(30):
                await ended.wait()
            assert rig.metric("baton_inter_token_latency_seconds_count") == 19
            (delta,) = await collect(generation)
            assert len(delta.token_ids) == 20
            generation.close()

    run(main)


def test_has_room_is_told_at_first_tokens_and_ends(model_directory: Path) -> None:
    async def main() -> None:
        told: list[None] = []
        async with generating(model_directory, FakeDecodeWorker(speaks), has_room=lambda: told.append(None)) as rig:
            await rig.run(ask())
            assert len(told) == 2

    run(main)
