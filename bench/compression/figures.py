"""What became of the tokens when a prompt's KV came back from a lower tier. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache.tiers.interface import StorageFormat

Logits = NDArray[np.float32]
"""[position, vocabulary]."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine said to a prompt, greedily."""

    token_ids: tuple[int, ...]
    logits: Logits
    """That each token was the largest of."""
    restored_tokens: int
    """Of the prompt: came up from a lower tier."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Between an answer with KV as it was computed, and one whose prompt's KV was restored."""

    tokens: int
    """Of the first."""
    common_tokens: int
    """Before they part."""
    margin: float
    """By how much the first's first token was ahead of the runner-up."""
    logit_difference: float
    """The largest, at the first position."""
    kl_nats: float
    """From the first's distribution of the first token to the other's."""
    kl_nats_mean: float
    """Over all positions whose tokens before are the same."""
    was_right: bool | None
    """The first answer's first token; None: nobody knows what is right."""
    is_right: bool | None
    """The other's."""

    @property
    def is_first_same(self) -> bool:
        return self.common_tokens > 0

    @property
    def is_changed(self) -> bool:
        return self.common_tokens < self.tokens


def difference(computed: Answer, restored: Answer, right: int | None = None) -> Difference:
    """`right`: the token that a right answer begins with."""
    pairs = zip(computed.token_ids, restored.token_ids, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    comparable = min(common + 1, len(computed.token_ids), len(restored.token_ids))
    kl = kl_nats(computed.logits[:comparable], restored.logits[:comparable])
    runner_up, best = np.partition(computed.logits[0], -2)[-2:]
    return Difference(
        tokens=len(computed.token_ids),
        common_tokens=common,
        margin=float(best - runner_up),
        logit_difference=float(np.abs(computed.logits[0] - restored.logits[0]).max()),
        kl_nats=float(kl[0]),
        kl_nats_mean=float(kl.mean()),
        was_right=None if right is None else computed.token_ids[0] == right,
        is_right=None if right is None else restored.token_ids[0] == right,
    )


def kl_nats(computed: Logits, restored: Logits) -> NDArray[np.float64]:
    """How far the second's next-token distributions are from the first's, at each position: the sum of
    `p log(p / q)`, 0 where they are the same."""
    p, q = _log_softmax(computed), _log_softmax(restored)
    kl: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return np.maximum(kl, 0.0)


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    made: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return made


@dataclass(frozen=True, slots=True)
class Effect:
    """Of one way to keep KV below HBM, on one model in one dtype."""

    model: str
    dtype: str
    storage: StorageFormat
    differences: Sequence[Difference]

    def share(self, holds: Callable[[Difference], bool]) -> float:
        return fmean(map(holds, self.differences))

    def mean(self, value: Callable[[Difference], float]) -> float:
        return fmean(map(value, self.differences))

    def largest(self, value: Callable[[Difference], float]) -> float:
        return max(map(value, self.differences))

    @property
    def margin(self) -> float:
        """The median."""
        return median(each.margin for each in self.differences)

    @property
    def was_right(self) -> int | None:
        return _count(each.was_right for each in self.differences)

    @property
    def is_right(self) -> int | None:
        return _count(each.is_right for each in self.differences)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "dtype": self.dtype,
            "storage": self.storage,
            "prompts": len(self.differences),
            "first_token_equal_share": self.share(lambda each: each.is_first_same),
            "tokens_mean": self.mean(lambda each: each.tokens),
            "common_tokens_mean": self.mean(lambda each: each.common_tokens),
            "changed_share": self.share(lambda each: each.is_changed),
            "first_logit_margin_median": self.margin,
            "logit_difference_max": self.largest(lambda each: each.logit_difference),
            "first_kl_nats_mean": self.mean(lambda each: each.kl_nats),
            "first_kl_nats_max": self.largest(lambda each: each.kl_nats),
            "kl_nats_mean": self.mean(lambda each: each.kl_nats_mean),
            "right_computed": self.was_right,
            "right_restored": self.is_right,
            "differences": [asdict(each) for each in self.differences],
        }


def _count(verdicts: Iterable[bool | None]) -> int | None:
    known = [verdict for verdict in verdicts if verdict is not None]
    return sum(known) if known else None
