"""What tiers cost an engine's steps: one with tiers and one without, each in a process of its own, taking turns."""

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from baton.ids import RequestId
from baton.sampling import SamplingParams
from baton.settings import WorkerSettings
from bench.load import FIRST_TOKEN_ID
from bench.tiers.figures import StepCost, TiersDo, Work
from bench.worker_processes import StartFailed
from engine.interface import Engine, EngineRequest, Prefill
from engine.opening import load_engine

WORKS: tuple[Work, ...] = ("prefill", "decode")
CHUNK_TOKENS = 512
PREFILL_TOKENS = 4096
DECODE_BATCH = 8
DECODE_CONTEXT = 500
DECODE_STEPS = 48
BLOCK_TOKENS = 32
TURN_BLOCKS = (PREFILL_TOKENS + DECODE_BATCH * (DECODE_CONTEXT + DECODE_STEPS + BLOCK_TOKENS)) // BLOCK_TOKENS
"""That one turn fills with what was never there before."""
DDR_BYTES = 2**30
SSD_BYTES = 2**30
SMALL_DDR_BYTES = 80 * 2**20
ANSWER_TIMEOUT_S = 120.0
IDLE_WAIT_S = 0.2
"""Until what a turn has set in motion has come to rest, polled."""


@dataclass(frozen=True, slots=True)
class StepTime:
    wall_s: float
    cpu_s: float
    """Of the engine's thread alone: other processes, and the I/O threads, hardly change it."""


@dataclass(frozen=True, slots=True)
class TurnTimes:
    """One turn's steps, in their order."""

    prefill: Sequence[StepTime]
    decode: Sequence[StepTime]

    def of(self, work: Work) -> Sequence[StepTime]:
        return self.prefill if work == "prefill" else self.decode


PairTimes = Sequence[tuple[TurnTimes, TurnTimes]]
"""Each turn's of an engine without tiers, and of one with."""


def step_costs(
    model: Path, disk: Path, pairs: int, turns: int, seed: int, advance: Callable[[], None]
) -> list[StepCost]:
    """`turns`: of each engine, plain and tiered ones in the order ABBA. How a process' memory happens to lie costs it
    more or less than tiers do, hence `pairs` of engines, one after the other. Raises StartFailed."""
    costs = []
    below: dict[TiersDo, dict[str, Any]] = {
        "idle": {"ddr_bytes": DDR_BYTES},
        "offload": {"ddr_bytes": SMALL_DDR_BYTES, "ssd_dir": disk, "ssd_bytes": SSD_BYTES},
    }
    blocks: dict[TiersDo, int] = {"idle": (turns + 2) * TURN_BLOCKS, "offload": TURN_BLOCKS + BLOCK_TOKENS}
    for tiers, settings in below.items():
        pool, timed = blocks[tiers], list[PairTimes]()
        for pair in range(pairs):
            with _engine(model, kv_blocks=pool) as plain, _engine(model, kv_blocks=pool, **settings) as tiered:
                timed.append(_take_turns(plain, tiered, turns, seed + pair * (turns + 1)))
            advance()
        costs += [_cost(work, tiers, timed) for work in WORKS]
    return costs


def _take_turns(plain: Connection, tiered: Connection, turns: int, seed: int) -> PairTimes:
    """The first turn of each only warms up."""
    pairs = []
    for turn in range(turns + 1):
        order = [plain, tiered] if turn % 2 else [tiered, plain]
        times = {engine: _ask(engine, seed + turn) for engine in order}
        pairs.append((times[plain], times[tiered]))
    return pairs[1:]


def _cost(work: Work, tiers: TiersDo, pairs: Sequence[PairTimes]) -> StepCost:
    steps = [_steps(work, pair) for pair in pairs]
    of_plain = [median(tiered.wall_s / plain.wall_s for plain, tiered in pair) for pair in steps]
    return StepCost(
        work,
        tiers,
        step_ms=1000 * median(tiered.wall_s for pair in steps for _, tiered in pair),
        plain_step_ms=1000 * median(plain.wall_s for pair in steps for plain, _ in pair),
        of_plain=median(of_plain),
        of_plain_least=min(of_plain),
        of_plain_most=max(of_plain),
        cpu_of_plain=median(median(tiered.cpu_s / plain.cpu_s for plain, tiered in pair) for pair in steps),
    )


def _steps(work: Work, pair: PairTimes) -> list[tuple[StepTime, StepTime]]:
    return [both for plain, tiered in pair for both in zip(plain.of(work), tiered.of(work), strict=True)]


# ---- the parent's end


@contextmanager
def _engine(model: Path, **settings: Any) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")  # a fork would take the parent's threads with it
    ours, theirs = context.Pipe()
    options = {
        "model": str(model),
        "threads": 1,
        "chunk_tokens": CHUNK_TOKENS,
        "block_tokens": BLOCK_TOKENS,
        **settings,
    }
    process = context.Process(target=_serve, args=(theirs, options), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send(None)
        process.join(ANSWER_TIMEOUT_S)
    finally:
        process.kill()
        process.join()
        ours.close()


def _ask(engine: Connection, seed: int) -> TurnTimes:
    engine.send(seed)
    try:
        if engine.poll(ANSWER_TIMEOUT_S):
            times: TurnTimes = engine.recv()
            return times
    except EOFError:
        raise StartFailed("an engine of the benchmark has ended") from None
    raise StartFailed("an engine of the benchmark does not answer")


# ---- the child's


def _serve(pipe: Connection, options: dict[str, Any]) -> None:
    engine = load_engine(WorkerSettings(**options))
    try:
        while (seed := pipe.recv()) is not None:
            pipe.send(_turn(engine, random.Random(seed), engine.model.vocabulary_size))
    finally:
        engine.close()


def _turn(engine: Engine, chance: random.Random, vocabulary: int) -> TurnTimes:
    def add(tokens: int, new: int) -> None:
        prompt = tuple(chance.choices(range(FIRST_TOKEN_ID, vocabulary), k=tokens))
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        engine.add(EngineRequest(RequestId(f"bench-{chance.random()}"), prompt, sampling, Prefill.HERE))

    add(PREFILL_TOKENS, 1)
    prefill = _step_until_idle(engine, lambda tokens, _: tokens == CHUNK_TOKENS)
    for _ in range(DECODE_BATCH):
        add(DECODE_CONTEXT, DECODE_STEPS + BLOCK_TOKENS)  # the last ones to come see enough steps of all
    decode = _step_until_idle(engine, lambda tokens, sequences: not tokens and sequences == DECODE_BATCH)
    return TurnTimes(prefill, decode[:DECODE_STEPS])


def _step_until_idle(engine: Engine, counts: Callable[[int, int], bool]) -> list[StepTime]:
    """Of the steps whose prompt tokens and decoding sequences count."""
    times: list[StepTime] = []
    until_s = time.perf_counter() + IDLE_WAIT_S
    while engine.has_work or time.perf_counter() < until_s:
        if not engine.has_work:
            time.sleep(0.001)
            continue
        began_s, cpu_began_s = time.perf_counter(), time.thread_time()
        timing = engine.step().timing
        ended_s, cpu_s = time.perf_counter(), time.thread_time() - cpu_began_s
        if timing is not None:
            until_s = ended_s + IDLE_WAIT_S
            if counts(timing.work.new_tokens, timing.work.sequences):
                times.append(StepTime(ended_s - began_s, cpu_s))
    return times
