"""From single requests to the figures of bench.handoff. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median
from typing import Any, Literal

Way = Literal["local", "streamed", "send_after", "streamed_unverified"]
"""Prefilled on the decode worker itself; or elsewhere, and the KV blocks sent while or after they were computed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request; the parts are what the workers said of it."""

    way: Way
    tokens: int
    token_id: int
    """The first one generated."""
    ttft_s: float
    queue_s: float = 0.0
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    exposed_s: float = 0.0
    transfer_bytes: int = 0
    transport: str = ""

    @property
    def rest_s(self) -> float:
        """What no worker accounts for: calls between processes, verification, commit."""
        return self.ttft_s - self.queue_s - self.prefill_queue_s - self.prefill_s - self.exposed_s

    @property
    def hidden_share(self) -> float:
        return max(0.0, 1 - self.exposed_s / self.transfer_s) if self.transfer_s else 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """All samples of one link and prompt length; the ways took turns, so the i-th of each belong together."""

    link: str
    tokens: int
    samples: Sequence[Sample]

    def of(self, way: Way) -> list[Sample]:
        return [sample for sample in self.samples if sample.way == way]

    def middle(self, way: Way, figure: Callable[[Sample], float]) -> float | None:
        return median(map(figure, own)) if (own := self.of(way)) else None

    def ratio(self, way: Way, other: Way, figure: Callable[[Sample], float]) -> float | None:
        """The median over the turns: what slows the machine for a while slows both of a turn."""
        pairs = list(zip(self.of(way), self.of(other), strict=True)) if self.of(way) and self.of(other) else []
        return median(figure(a) / figure(b) for a, b in pairs) if pairs else None

    def ratio_of_best(self, way: Way, other: Way, figure: Callable[[Sample], float]) -> float | None:
        """On a machine that does other work too, the least of many is what each takes by itself."""
        ours, theirs = self.of(way), self.of(other)
        return min(map(figure, ours)) / min(map(figure, theirs)) if ours and theirs else None

    def as_json(self) -> dict[str, Any]:
        return {
            "link": self.link,
            "tokens": self.tokens,
            "requests_each": len(self.of("local")),
            "ttft_local_s": self.middle("local", ttft),
            "ttft_streamed_s": self.middle("streamed", ttft),
            "ttft_send_after_s": self.middle("send_after", ttft),
            "ttft_unverified_s": self.middle("streamed_unverified", ttft),
            "hidden_share": self.middle("streamed", lambda s: s.hidden_share),
            "streamed_over_local": self.ratio("streamed", "local", ttft),
            "streamed_over_local_best": self.ratio_of_best("streamed", "local", ttft),
            "streamed_over_send_after": self.ratio("streamed", "send_after", ttft),
            "verified_over_unverified": self.ratio("streamed", "streamed_unverified", ttft),
            "prefill_streamed_over_send_after": self.ratio("streamed", "send_after", prefill),
            "prefill_streamed_over_send_after_best": self.ratio_of_best("streamed", "send_after", prefill),
            "transfer_bytes": self.middle("streamed", lambda s: s.transfer_bytes),
            "parts": {way: self.parts(way) for way in ("streamed", "send_after") if self.of(way)},
        }

    def parts(self, way: Way) -> dict[str, float | None]:
        """Of the time to first token; `transfer_s` but for what is exposed lies under the others."""
        figures = ("queue_s", "prefill_queue_s", "prefill_s", "transfer_s", "exposed_s", "rest_s")
        return {name: self.middle(way, attrgetter(name)) for name in figures}


def ttft(sample: Sample) -> float:
    return sample.ttft_s


def prefill(sample: Sample) -> float:
    return sample.prefill_s


def disagreements(samples: Sequence[Sample]) -> int:
    """Requests of one turn, which have the same prompt, whose first token is not that of the first of them."""
    return sum(sample.token_id != samples[0].token_id for sample in samples)
