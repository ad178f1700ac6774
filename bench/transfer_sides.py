"""What bench.transfer compares, and how one of them is measured: two processes, one form after another."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.transfer_end import End, EndFailed
from bench.transfer_plan import Form, hull

AT_LEAST = 3
LATENCIES = 200
WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Side:
    """One way to move; `module` is what its ends run."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    python: Path = Path(sys.executable)
    more: Mapping[str, str] = field(default_factory=dict)
    """Told with each `move`."""
    has_two_ends: bool = True


@dataclass(slots=True)
class Figures:
    """What the rounds showed of one side and form."""

    total_bytes: int
    each_s: list[float] = field(default_factory=list)
    """Of all rounds."""
    cpu_s: float = 0.0
    """Of both processes, for all of `each_s`."""
    latencies_s: list[float] = field(default_factory=list)
    """Of one block in one layer, its keys and its values, until they were in their place."""

    @property
    def gb_per_s(self) -> float:
        """The best: what else the machine does only ever slows down."""
        return self.total_bytes / min(self.each_s) / 1e9

    @property
    def gb_per_s_median(self) -> float:
        return self.total_bytes / median(self.each_s) / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_s / (len(self.each_s) * self.total_bytes / 1e9)

    def add(self, other: "Figures") -> None:
        self.each_s += other.each_s
        self.cpu_s += other.cpu_s
        self.latencies_s += other.latencies_s


def measure(side: Side, forms: Sequence[Form], at_least_s: float) -> Iterator[tuple[Form, Figures]]:
    """Each form, all in slices of one size, for so long.

    Raises EndFailed if an end cannot do it, or has other bytes than were sent."""
    sizes = hull(forms)
    shape = (sizes.slice_bytes, sizes.layers, sizes.blocks)
    with ExitStack() as stack:
        source = stack.enter_context(End(side.python, side.module, *side.arguments, *shape))
        if not side.has_two_ends:
            for form in forms:
                yield form, _moved([source], form, side.more, at_least_s)
            return
        target = stack.enter_context(End(side.python, side.module, *side.arguments, *shape))
        source.ask("connect", offer=target.ask("open"))
        for form in forms:
            figures = _moved([source, target], form, side.more, at_least_s)
            one_block = source.ask("move", layers=1, blocks=1, at_least_s=0, at_least=LATENCIES, **side.more)
            figures.latencies_s = one_block["each_s"]
            yield form, figures
            _check(side, form, source, target)


def _moved(ends: Sequence[End], form: Form, more: Mapping[str, str], at_least_s: float) -> Figures:
    source, others = ends[0], ends[1:]
    what: dict[str, Any] = {"layers": form.layers, "blocks": form.blocks, **more}
    source.ask("move", **what, at_least_s=0, at_least=WARM_UPS)
    cpu_s = -sum(end.ask("cpu") for end in others)
    result = source.ask("move", **what, at_least_s=at_least_s, at_least=AT_LEAST)
    cpu_s += sum(end.ask("cpu") for end in others)
    return Figures(form.total_bytes, result["each_s"], cpu_s + result["cpu_s"])


def _check(side: Side, form: Form, source: End, target: End) -> None:
    if len({end.ask("check", layers=form.layers, blocks=form.blocks) for end in (source, target)}) > 1:
        raise EndFailed(f"what {side.name} moved is not what was sent")


# ---- which


def own_sides(transports: Iterable[str]) -> list[Side]:
    return [Side(name, "bench.transfer_own", (name,)) for name in transports]


def baselines() -> list[Side]:
    module = "bench.transfer_socket"
    return [Side("memcpy", module, ("memcpy",), has_two_ends=False), Side("socket", module, ("socket",))]


def peer_sides(python: Path) -> list[Side]:
    """Bare NIXL, both ways: in memory like a worker's region, and in private memory, which may lie in huge pages."""
    return [
        Side(f"nixl-{operation}{suffix}", "bench.transfer_peer", (memory,), python, {"operation": operation.upper()})
        for memory, suffix in (("shared", ""), ("private", "-private"))
        for operation in ("write", "read")
    ]
