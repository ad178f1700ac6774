"""A decode worker in virtual time: reserves blocks, has them filled, and decodes."""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

from baton.errors import Overloaded
from engine.interface import FinishReason, Prefill
from engine.sequence import LiveSequence
from simulator.job import Job
from simulator.link import Link, Transfer
from simulator.prefill import SimulatedPrefillWorker, Ticket
from simulator.sequence import SimulatedSequence
from simulator.worker import Setup, SimulatedWorker


class Router(Protocol):
    """Who hears of a request at the instant it happens; the way there takes `message_s` more."""

    def first_token(self, job: Job) -> None: ...

    def progress(self, job: Job, tokens: int) -> None:
        """So many tokens more have come, after the first."""

    def finished(self, job: Job) -> None: ...

    def refused(self, job: Job, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Active:
    job: Job
    prefill: SimulatedPrefillWorker | None


class SimulatedDecodeWorker:
    def __init__(self, setup: Setup, worker_id: str, slowdown: float, router: Router) -> None:
        self.worker = SimulatedWorker(setup, worker_id, "decode", slowdown, self)
        self.incoming = Link(setup.profile.latency.transfer.bytes_per_s)
        self._time, self._profile, self._router = setup.time, setup.profile, router
        self._active: dict[int, _Active] = {}

    def submit(self, job: Job, prefill: SimulatedPrefillWorker | None) -> None:
        if job.request.prompt_tokens <= self._profile.local_prefill_tokens_max:
            prefill = None
        job.decode_worker = self.worker.worker_id
        self._active[job.number] = _Active(job, prefill)
        try:
            self.worker.begin(job, Prefill.HERE if prefill is None else Prefill.ELSEWHERE)
        except Overloaded as error:
            del self._active[job.number]
            self._router.refused(job, str(error))

    # ---- from the engine

    def admitted(self, sequence: SimulatedSequence) -> None:
        active = self._active[sequence.number]
        job, prefill = active.job, active.prefill
        lacking = job.request.prompt_tokens - sequence.cached_tokens
        if prefill is None or lacking <= self._profile.local_prefill_tokens_max:
            if prefill is not None:
                self.worker.engine.prefill_here(sequence)
            return
        job.prefill_worker = prefill.worker.worker_id
        ticket = Ticket(
            job,
            sequence.cached_tokens,
            self.incoming,
            committed=partial(self._committed, sequence),
            failed=partial(self._not_prefilled, active, sequence),
        )
        self._time.after(self._profile.message_s, lambda: prefill.open(ticket))

    def _committed(self, sequence: SimulatedSequence, transfer: Transfer) -> None:
        if transfer.size_bytes:
            seconds = transfer.cost.latency_s + transfer.busy_s
            self.worker.fit.observe_transfer(transfer.size_bytes, self.worker.noisy(seconds))
        self.worker.engine.commit(sequence)

    def _not_prefilled(self, active: _Active, sequence: SimulatedSequence) -> None:
        """The real one would try other prefill workers first; they are as full as this one then."""
        active.job.prefill_worker = ""
        self.worker.engine.prefill_here(sequence)
        self.worker.engine.wake()

    def computing(self, sequence: LiveSequence, start: int, end: int, until_s: float) -> None:
        """A prompt that is computed here need not travel."""

    def progressed(self, sequence: LiveSequence, tokens: int) -> None:
        assert isinstance(sequence, SimulatedSequence)
        self._router.progress(self._active[sequence.number].job, tokens)

    def generated(self, sequence: SimulatedSequence, reason: FinishReason | None) -> None:
        job = self._active[sequence.number].job
        if job.first_token_s is None:
            job.first_token_s = self._time.now_s
            if not job.prefill_worker:
                job.computed_with(sequence)
            self._router.first_token(job)
        if reason is not None:
            job.finished_s = self._time.now_s
            del self._active[sequence.number]
            self._router.finished(job)

    def broken(self, sequence: SimulatedSequence) -> None:
        raise AssertionError(f"{sequence.number} is computed here, from whatever block on")
