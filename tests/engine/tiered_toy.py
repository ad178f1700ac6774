"""The toy engine over fake lower tiers, and a prompt that lies in them."""

from collections.abc import Sequence

from fake_tiers import FakeTiers, ToyRows
from toy_engine import ToyEngine, toy_reference

from baton.ids import BlockHash, RequestId
from baton.sampling import SamplingParams
from engine.scheduler import Limits
from kvcache.block_hash import block_hashes, root_hash

A, B, C = RequestId("a"), RequestId("b"), RequestId("c")
PROMPT = tuple(range(1, 22))
"""Five blocks and a token."""
LIMITS = Limits(chunk_tokens=8, sequences_max=8, waiting_max=64)


class Now:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds


def names(tokens: Sequence[int]) -> list[BlockHash]:
    return block_hashes(root_hash("toy", 4, "float32"), tokens, 4)


def tiered(blocks: int = 12, **options: object) -> ToyEngine:
    toy = ToyEngine(blocks=blocks, tiers=lambda region: FakeTiers(ToyRows(region)), clock=Now(), **options)  # type: ignore[arg-type]
    tiers_of(toy).pass_time = toy.clock.pass_time  # type: ignore[attr-defined]
    return toy


def tiers_of(toy: ToyEngine) -> FakeTiers:
    tiers = toy.engine.tiers
    assert isinstance(tiers, FakeTiers)
    return tiers


def reference(prompt: Sequence[int], tokens: int = 4) -> list[int]:
    return toy_reference(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True), 1 << 10)


def fill(toy: ToyEngine, seed: int = 0) -> None:
    """Pushes everything out of the pool that nobody holds."""
    free = toy.engine.stats().kv_blocks_total - toy.engine.stats().kv_blocks_used
    tokens = [1 + (seed + i) % 48 for i in range(4 * free - 4)]
    name = f"filler{seed}"
    toy.add(name, tokens, salt=name, max_tokens=2)
    toy.run()


def below(toy: ToyEngine, *, at_once: bool = True, prompt: Sequence[int] = PROMPT) -> FakeTiers:
    """The prompt's blocks lie below HBM, and nowhere else."""
    toy.add("first", prompt)
    toy.run()
    fill(toy)
    tiers = tiers_of(toy)
    tiers.at_once = at_once
    assert all(tiers.tier_of(name) == "ddr" for name in names(prompt))
    return tiers
