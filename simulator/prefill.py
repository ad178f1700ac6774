"""A prefill worker in virtual time: computes prompts and streams their KV to decode workers meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import Overloaded
from engine.interface import FinishReason, Prefill
from engine.sequence import LiveSequence
from simulator.job import Job
from simulator.link import Link, Transfer
from simulator.sequence import SimulatedSequence
from simulator.trace import TRACE_BLOCK_TOKENS
from simulator.worker import Setup, SimulatedWorker


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to fill a request's blocks on a decode worker."""

    job: Job
    cached_tokens: int
    """Found there already: these do not travel."""
    target: Link
    committed: Callable[[Transfer], None]
    """All has landed, the first token too."""
    failed: Callable[[], None]
    """The prefill worker does not take it."""


@dataclass(frozen=True, slots=True)
class _Open:
    ticket: Ticket
    transfer: Transfer


class SimulatedPrefillWorker:
    def __init__(self, setup: Setup, worker_id: str, slowdown: float) -> None:
        self.worker = SimulatedWorker(setup, worker_id, "prefill", slowdown, self)
        self.outgoing = Link(setup.profile.latency.transfer.bytes_per_s)
        self._time, self._profile = setup.time, setup.profile
        self._open: dict[int, _Open] = {}

    def open(self, ticket: Ticket) -> None:
        cost = self._profile.latency.transfer
        number = ticket.job.number
        self._open[number] = _Open(ticket, Transfer(self.outgoing, ticket.target, cost, self._profile.layers))
        try:
            self.worker.begin(ticket.job, Prefill.ONLY)
        except Overloaded:
            del self._open[number]
            self._time.after(self._profile.message_s, ticket.failed)

    # ---- from the engine

    def admitted(self, sequence: SimulatedSequence) -> None:
        """What is cached in HBM here can leave at once; what is restored leaves with the first step."""
        end = sequence.published * TRACE_BLOCK_TOKENS
        self._send(self._open[sequence.number], 0, end, self._time.now_s)

    def computing(self, sequence: LiveSequence, start: int, end: int, until_s: float) -> None:
        assert isinstance(sequence, SimulatedSequence)
        self._send(self._open[sequence.number], start, end, until_s)

    def _send(self, opened: _Open, start: int, end: int, until_s: float) -> None:
        lacking = end - max(start, opened.ticket.cached_tokens)
        if lacking > 0:
            opened.transfer.send(self._time.now_s, until_s, lacking * self._profile.kv_token_bytes)

    def progressed(self, sequence: LiveSequence, tokens: int) -> None:
        """Nothing is decoded here."""

    def generated(self, sequence: SimulatedSequence, reason: FinishReason | None) -> None:
        assert reason is not None
        opened = self._open.pop(sequence.number)
        opened.ticket.job.computed_with(sequence)
        transfer = opened.transfer
        landed_s = max(transfer.landed_s, self._time.now_s) + transfer.cost.latency_s

        def landed() -> None:
            self.worker.engine.release(sequence)
            self._time.after(self._profile.message_s, lambda: opened.ticket.committed(transfer))

        self._time.at(landed_s, landed)
        if transfer.size_bytes:
            seconds = transfer.cost.latency_s + transfer.busy_s
            self.worker.fit.observe_transfer(transfer.size_bytes, self.worker.noisy(seconds))

    def broken(self, sequence: SimulatedSequence) -> None:
        self._time.after(self._profile.message_s, self._open.pop(sequence.number).ticket.failed)
