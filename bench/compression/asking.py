"""An engine whose pool is so small that prompts go down to DDR and come up again."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from time import monotonic

import numpy as np

from baton.ids import RequestId
from baton.latency import DEFAULT_LATENCY, PrefillCost
from baton.layout import PROBE_BLOCKS
from baton.sampling import SamplingParams
from baton.settings import WorkerSettings, load_settings
from bench.compression.figures import Answer, Difference, difference
from engine.batch import Draw, Drawn
from engine.core import LocalEngine
from engine.digests import RegionDigester
from engine.interface import EngineRequest, ModelInfo, Prefill
from engine.model.loader import LoadedModel
from engine.runner import ModelRunner, StepLogits, kv_layout
from engine.sampler import sample
from engine.scheduler import Limits
from engine.sequence import root_of
from engine.tiers import LateCosts, open_lower_tiers
from kvcache.block_hash import block_hashes
from kvcache.tiers.interface import StorageFormat
from kvtransfer.region import HostRegion

BLOCK_TOKENS = 32
POOL_PROMPTS = 2
"""Fit into the pool."""
FILLERS, EVICTIONS_MAX = POOL_PROMPTS + 1, 8
"""Prompts whose only use is to push out what has not left by itself, in so many rounds at most."""
ANSWER_TIMEOUT_S = 120.0
IDLE_POLL_S = 0.05
PAGE_BYTES = 4096
"""Rows of DDR begin on pages."""
SLOW = replace(DEFAULT_LATENCY, prefill=PrefillCost(chunk_s=1.0, token_s=1.0, token_context_s=0.0))
"""The engine is told that computing takes for ever: it restores all that it can, and gives nothing up."""


class NotRestored(Exception):
    """A prompt's KV did not come from the tier that it was to come from."""


@dataclass(frozen=True, slots=True)
class Question:
    prompt: tuple[int, ...]
    right: int | None = None
    """The token that a right answer begins with, where there is one."""


@dataclass(slots=True)
class Asking:
    engine: LocalEngine[StepLogits]
    drawn_from: list[StepLogits]
    """What the tokens of the one request that runs were drawn from; the sampler adds to it."""
    woken: threading.Event = field(default_factory=threading.Event)
    asked: int = 0

    def answer(self, question: Question, tokens: int, *, ignore_eos: bool) -> Answer:
        """Of so many tokens at most. Alone in the engine."""
        self.drawn_from.clear()
        self.asked += 1
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=ignore_eos)
        request = EngineRequest(RequestId(f"bench-{self.asked}"), question.prompt, sampling, Prefill.HERE)
        self.engine.add(request)
        token_ids, restored, deadline_s = list[int](), 0, monotonic() + ANSWER_TIMEOUT_S
        while True:
            result = self.engine.step()
            if result.failed or monotonic() > deadline_s:
                raise NotRestored("a request failed, or took for ever")
            for generated in result.generated:
                token_ids += generated.token_ids
                restored = generated.restored_tokens
                if generated.finish_reason is not None:
                    logits = np.concatenate([step.logits.numpy() for step in self.drawn_from])
                    return Answer(tuple(token_ids), logits, restored)
            if not self.engine.has_work:
                self.woken.wait(IDLE_POLL_S)
                self.woken.clear()

    def evict(self, question: Question, fillers: Sequence[Question]) -> None:
        """Until none of its blocks lies in HBM. Raises NotRestored."""
        assert self.engine.tiers is not None
        root, block_tokens = root_of(self.engine.model, ""), self.engine.model.layout.block_tokens
        names = block_hashes(root, question.prompt, block_tokens)
        for _ in range(EVICTIONS_MAX):
            if "hbm" not in map(self.engine.tiers.tier_of, names):
                return
            for filler in fillers:
                self.answer(filler, 1, ignore_eos=True)
        raise NotRestored("a prompt's KV does not leave HBM")


@contextmanager
def asking(loaded: LoadedModel, storage: StorageFormat, prompts: int, tokens_max: int) -> Iterator[Asking]:
    """On the CPU. DDR holds that many prompts, with answers of `tokens_max` tokens together, and as many more."""
    blocks = -(-tokens_max // BLOCK_TOKENS) + 1
    row_bytes = kv_layout(loaded, BLOCK_TOKENS, 1).block_bytes + PAGE_BYTES
    flags = {
        "kv_blocks": POOL_PROMPTS * blocks,
        "block_tokens": BLOCK_TOKENS,
        "ddr_bytes": 2 * prompts * blocks * row_bytes,
        "kv_compression": storage,
    }
    settings = load_settings(WorkerSettings, flags)
    layout = kv_layout(loaded, BLOCK_TOKENS, settings.kv_blocks + PROBE_BLOCKS)
    region, facts, costs, drawn_from = HostRegion.allocate(layout), loaded.facts, LateCosts(), list[StepLogits]()
    context = min(facts.context_length, settings.kv_blocks * BLOCK_TOKENS)
    model = ModelInfo("bench", facts.fingerprint, context, facts.vocabulary_size, facts.eos_token_ids, layout)

    def note(logits: StepLogits, draws: Sequence[Draw]) -> list[Drawn]:
        if draws:
            drawn_from.append(logits)
        return sample(logits.logits, draws)

    engine: LocalEngine[StepLogits] = LocalEngine(
        model,
        region,
        ModelRunner(loaded, region),
        note,
        Limits.of(settings),
        digester=RegionDigester(region),
        tiers=open_lower_tiers(settings, model, region, costs),
    )
    costs.costs, engine.latency = engine.costs, lambda: SLOW
    made = Asking(engine, drawn_from)
    engine.set_wake(made.woken.set)
    try:
        yield made
    finally:
        engine.close()


def measure_effect(
    loaded: LoadedModel,
    storage: StorageFormat,
    questions: Sequence[Question],
    tokens: int,
    *,
    ignore_eos: bool,
    advance: Callable[[], None],
) -> list[Difference]:
    """Asks all, which computes them, and then all again, each when it has left HBM. Raises NotRestored."""
    longest = max(len(question.prompt) for question in questions)
    chance, ids = Random(0), range(loaded.facts.vocabulary_size)
    fillers = [Question(tuple(chance.choices(ids, k=longest))) for _ in range(FILLERS)]
    with asking(loaded, storage, len(questions) + FILLERS, longest + tokens) as engine:
        computed = []
        for question in questions:
            computed.append(engine.answer(question, tokens, ignore_eos=ignore_eos))
            advance()
        differences = []
        for question, before in zip(questions, computed, strict=True):
            engine.evict(question, fillers)
            after = engine.answer(question, tokens, ignore_eos=ignore_eos)
            whole = (len(question.prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            if before.restored_tokens or after.restored_tokens != whole:
                raise NotRestored(f"{after.restored_tokens} of a prompt's {whole} tokens came from DDR")
            differences.append(difference(before, after, question.right))
            advance()
        return differences
