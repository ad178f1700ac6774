"""Fits the latency model to what a worker measures, step by step, while it serves.

Weighted least squares with exponential forgetting: the sums `Σ w·x·xᵀ` and `Σ w·x·y` over the past, in which each
observation counts for its *relative* error. After every observation the coefficients move towards the sums'
minimum: first all of them by the one factor that fits best - a worker that becomes slower becomes slower at
everything - then one after another, in a few rounds of coordinate descent, none below zero (Zakharov, White, Liu,
"Low-complexity RLS algorithms using dichotomous coordinate descent iterations", IEEE Trans. Signal Processing 56,
2008, descends likewise). What the observations do not tell apart stays as it was: a worker that always sees full
chunks, or the same batch, keeps the split of its cost and follows the whole.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import exp, log
from statistics import median

from baton.latency import (
    DEFAULT_LATENCY,
    DecodeCost,
    PrefillCost,
    StepWork,
    Tier,
    TransferCost,
    WorkerLatency,
)

FORGETTING = 0.97
"""An observation's weight shrinks by this with each one after it: some thirty count."""
OUTLIER_ERRORS = 3.0
"""What is off by more than so many times the usual error counts as if it were off by just that: a pause is not the
worker's speed. Errors are logarithms of measured over predicted."""
ERROR_MIN, ERROR_MAX = 0.02, 0.25
"""What the usual error is taken for at least and at most; at first it is the most."""
CHANGE_IN_A_ROW = 4
"""So many outliers in a row, all on one side, are a worker whose speed has changed: what was before is taken at the
new speed..."""
PAST_KEPT = 0.2
"""...and counts so much less, because it may be the model that does not fit."""
ROUNDS = 4
PASSES = 5
"""Over the steps of a self-test: from a start that is wrong by a factor of 1000 to less than 10 %."""
MIXED_DECODE_SHARE_MAX = 0.5
"""A step of both kinds tells of its chunks only where its sequences are predicted to take no more of it than this."""
TESTS_MAX = 32
"""Transfers of self-tests that are remembered until there is a real one."""
SECONDS_MIN = 1e-9
"""The least that is ever predicted."""
SECONDS_PER_BYTE_MIN = 1e-14
"""So that a link too fast to measure has a bandwidth too."""


class LinearFit:
    """`seconds = x · coefficients`, each of them at least 0; the features of `x` may be of any magnitude."""

    def __init__(self, coefficients: Sequence[float], *, changes_as_one: bool = True) -> None:
        """What holds until observations say otherwise. `changes_as_one`: a change is taken for one of all of them by
        the same factor, as it is where a worker becomes slower, but not where a link's bandwidth does."""
        assert min(coefficients) >= 0 < max(coefficients)
        self.coefficients = list(coefficients)
        self._changes_as_one = changes_as_one
        self._outliers: list[tuple[Sequence[float], float]] = []
        """In a row up to now, and all on one side."""
        self._error, self._is_slow = ERROR_MAX, False
        self._squares = [[0.0] * len(self.coefficients) for _ in self.coefficients]
        self._products = [0.0] * len(self.coefficients)

    def predict_s(self, x: Sequence[float]) -> float:
        return max(_dot(x, self.coefficients), SECONDS_MIN)

    def observe(self, x: Sequence[float], seconds: float) -> None:
        """`x` and `seconds` are positive, but some features may be 0."""
        if self._is_change(x, seconds):
            self._change_speed()
        else:
            self._take(x, seconds)

    def _is_change(self, x: Sequence[float], seconds: float) -> bool:
        """Whether this is an outlier, and with those right before it one too many."""
        error = log(seconds / self.predict_s(x))
        is_outlier = abs(error) > OUTLIER_ERRORS * self._error
        if not is_outlier or (error > 0) != self._is_slow:
            self._outliers.clear()
            self._is_slow = error > 0
        if is_outlier:
            self._outliers.append((x, seconds))
        return len(self._outliers) == CHANGE_IN_A_ROW

    def _change_speed(self) -> None:
        outliers, self._outliers, self._error = self._outliers, [], ERROR_MAX
        factor = median(seconds / self.predict_s(x) for x, seconds in outliers)
        weight = PAST_KEPT / factor**2  # relative to what is predicted from now on
        self._squares = [[weight * sum_ for sum_ in row] for row in self._squares]
        scale = factor if self._changes_as_one else 1.0
        self._products = [weight * scale * sum_ for sum_ in self._products]
        self._scale(scale)
        for x, seconds in outliers:
            self._take(x, seconds)

    def _take(self, x: Sequence[float], seconds: float) -> None:
        predicted_s = self.predict_s(x)
        error_max = OUTLIER_ERRORS * self._error
        error = min(max(log(seconds / predicted_s), -error_max), error_max)
        seconds = predicted_s * exp(error)
        usual = FORGETTING * self._error + (1 - FORGETTING) * abs(error)
        self._error = min(max(usual, ERROR_MIN), ERROR_MAX)
        for row, feature in zip(self._squares, x, strict=True):
            row[:] = (FORGETTING * sum_ + feature * other / predicted_s**2 for sum_, other in zip(row, x, strict=True))
        self._products = [
            FORGETTING * sum_ + feature * seconds / predicted_s**2
            for sum_, feature in zip(self._products, x, strict=True)
        ]
        self._descend()

    def _descend(self) -> None:
        squares, products, coefficients = self._squares, self._products, self.coefficients
        curvature = _dot(coefficients, [_dot(row, coefficients) for row in squares])
        if curvature > 0:
            self._scale(_dot(products, coefficients) / curvature)
        for _ in range(ROUNDS):
            for i, row in enumerate(squares):
                if row[i] > 0:
                    coefficients[i] = max(0.0, coefficients[i] + (products[i] - _dot(row, coefficients)) / row[i])

    def _scale(self, factor: float) -> None:
        self.coefficients[:] = (factor * coefficient for coefficient in self.coefficients)


class TransferFit:
    """`seconds = latency + bytes / bandwidth`. Until there was a real transfer the tests alone are what is known, and
    not what was assumed before them."""

    def __init__(self, start: TransferCost | None = None) -> None:
        """What holds until something was measured; None: nothing does."""
        self._fit = _line_fit((start.latency_s, 1 / start.bytes_per_s)) if start else None
        self._tests: list[tuple[int, float]] | None = []

    @property
    def cost(self) -> TransferCost | None:
        if self._fit is None:
            return None
        latency_s, byte_s = self._fit.coefficients
        return TransferCost(latency_s, 1 / max(byte_s, SECONDS_PER_BYTE_MIN))

    def observe(self, size_bytes: int, seconds: float) -> None:
        self._tests = None
        self._take(size_bytes, seconds)

    def observe_test(self, size_bytes: int, seconds: float) -> None:
        if self._tests is None or min(size_bytes, seconds) <= 0:
            self._take(size_bytes, seconds)
            return
        self._tests.append((size_bytes, seconds))
        del self._tests[:-TESTS_MAX]
        self._fit = _line_fit(_line_through(self._tests))
        for size, measured_s in self._tests:
            self._fit.observe((1, size), measured_s)

    def _take(self, size_bytes: int, seconds: float) -> None:
        """A clock may be too coarse to see anything; that says nothing."""
        if min(size_bytes, seconds) <= 0:
            return
        self._fit = self._fit or _line_fit(_line_through([(size_bytes, seconds)]))
        self._fit.observe((1, size_bytes), seconds)


class LatencyFit:
    """One worker's latency model, as its measurements so far have it. Not thread-safe."""

    def __init__(self, start: WorkerLatency = DEFAULT_LATENCY) -> None:
        self._start = start
        self._prefill = LinearFit((start.prefill.chunk_s, start.prefill.token_s, start.prefill.token_context_s))
        self._decode = LinearFit((start.decode.step_s, start.decode.sequence_s, start.decode.kv_token_s))
        self._transfer = TransferFit(start.transfer)
        self._restore = {tier: TransferFit(cost) for tier, cost in start.restore.items()}

    @classmethod
    def of(cls, steps: Sequence[tuple[StepWork, float]]) -> "LatencyFit":
        """From a few steps and the seconds they took, gone over until what was assumed before does not matter."""
        fit = cls()
        for _ in range(PASSES):
            fit = cls(fit.latency)
            for work, seconds in steps:
                fit.observe_step(work, seconds)
        return fit

    @property
    def latency(self) -> WorkerLatency:
        return replace(
            self._start,
            prefill=PrefillCost(*self._prefill.coefficients),
            decode=DecodeCost(*self._decode.coefficients),
            transfer=self._transfer.cost or self._start.transfer,
            restore={tier: cost for tier, fit in self._restore.items() if (cost := fit.cost)},
        )

    def observe_step(self, work: StepWork, seconds: float) -> None:
        """Sequences that decoded are taken for what they are predicted to add, and the rest is told of the chunks;
        where that would be guessing, nothing is."""
        if not work.new_tokens:
            self.observe_decode(work.sequences, work.kv_tokens, seconds)
            return
        decode_s = self.latency.added_decode_s(work)
        if decode_s <= MIXED_DECODE_SHARE_MAX * seconds:
            self.observe_prefill(work.new_tokens, work.token_context, seconds - decode_s, work.steps)

    def observe_prefill(self, new_tokens: int, token_context: float, seconds: float, steps: int = 1) -> None:
        """`token_context` is the sum of `new * context` over the chunks that these steps computed."""
        self._observe(self._prefill, (steps, new_tokens, token_context), seconds)

    def observe_decode(self, sequences: int, kv_tokens: int, seconds: float) -> None:
        """`kv_tokens` is what they attended to, all together."""
        self._observe(self._decode, (1, sequences, kv_tokens), seconds)

    def observe_transfer(self, size_bytes: int, seconds: float) -> None:
        self._transfer.observe(size_bytes, seconds)

    def observe_link_test(self, size_bytes: int, seconds: float) -> None:
        """One of a few transfers, small and large, by which a link is tested."""
        self._transfer.observe_test(size_bytes, seconds)

    def observe_restore(self, tier: Tier, size_bytes: int, seconds: float) -> None:
        """`seconds` is what moving the bytes took by itself: what a restore waited behind others is no property of
        the tier, and would be counted twice by who adds what waits there now."""
        self._restore.setdefault(tier, TransferFit()).observe(size_bytes, seconds)

    def observe_restore_test(self, tier: Tier, size_bytes: int, seconds: float) -> None:
        """One of a few restores, small and large, by which a tier is tested before there was a real one."""
        self._restore.setdefault(tier, TransferFit()).observe_test(size_bytes, seconds)

    @staticmethod
    def _observe(fit: LinearFit, x: Sequence[float], seconds: float) -> None:
        """A clock may be too coarse to see anything; that says nothing."""
        if seconds > 0:
            fit.observe(x, seconds)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _line_fit(line: tuple[float, float]) -> LinearFit:
    return LinearFit(line, changes_as_one=False)


def _line_through(transfers: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency and seconds per byte with the least squares of relative errors, neither below zero. All sizes and times
    are positive."""
    one = [1 / seconds for _, seconds in transfers]
    size = [size_bytes / seconds for size_bytes, seconds in transfers]
    squares, mixed, sizes = _dot(one, one), _dot(one, size), _dot(size, size)
    determinant = squares * sizes - mixed**2
    if determinant > 1e-9 * squares * sizes:
        latency_s = (sum(one) * sizes - sum(size) * mixed) / determinant
        byte_s = (sum(size) * squares - sum(one) * mixed) / determinant
        if min(latency_s, byte_s) >= 0:
            return latency_s, byte_s
    return 0.0, sum(size) / sizes
