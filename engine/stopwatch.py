"""How long engine steps take, beside what they computed."""

from collections.abc import Iterable

from baton.clock import Clock
from baton.latency import StepWork
from engine.interface import StepTiming


class Stopwatch:
    """Times steps from when they begin to when their results are there.

    A device computes on behind the host's back: only a step that draws tokens waits for it. So the steps of a prompt
    are timed together, up to the one that draws its first token; whatever came in between counts too.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s: float | None = None
        self._work: StepWork | None = None

    def begin(self) -> None:
        if self._began_s is None:
            self._began_s = self._clock()

    def end(self, work: StepWork, *, is_done: bool) -> StepTiming | None:
        """`is_done`: what was computed is there by now. If not, the time goes on to the next step's end."""
        assert self._began_s is not None
        work = work if self._work is None else self._work + work
        if not is_done:
            self._work = work
            return None
        timing = StepTiming(work, self._clock() - self._began_s)
        self.reset()
        return timing

    def reset(self) -> None:
        """Forgets what was begun: it came to nothing."""
        self._began_s = self._work = None


def work_of(spans: Iterable[tuple[int, int]]) -> StepWork:
    """One step's, which computes the tokens `[start, end)` of each of its sequences. A single token is computed as
    decoding computes it, whatever it is of."""
    sequences = kv_tokens = new_tokens = 0
    token_context = 0.0
    for start, end in spans:
        new = end - start
        if new == 1:
            sequences += 1
            kv_tokens += end
        else:
            new_tokens += new
            token_context += new * (start + new / 2)
    return StepWork(sequences, kv_tokens, new_tokens, token_context)
