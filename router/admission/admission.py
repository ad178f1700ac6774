"""Who gets in, and when: places bound what is held in memory, turns keep requests here until workers would serve them.

A request takes a place on arrival (`enter`), before it is even read. Once its tokens are counted it asks for its turn
(`turn`): it is checked against its tenant's limits, and waits in its model's queue, where the urgent pass and tenants
have fair shares, while the workers, which serve first come first served, have enough to do.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from baton.clock import Clock, monotonic
from baton.cluster.served_tokens import Share
from baton.errors import RateLimited, Unavailable
from baton.settings import RouterSettings
from router.admission.expected_tokens import ExpectedTokens
from router.admission.fair_queue import Ask
from router.admission.metrics import AdmissionMetrics
from router.admission.places import RETRY_AFTER_S, Place, Places
from router.admission.request_class import CLASSES, RequestClass
from router.admission.tenant_limits import NoLimits, TenantLimits
from router.admission.tenants import Tenant
from router.admission.turn_line import Capacity, TurnLine
from router.admission.turn_queue import TurnQueue


@dataclass(frozen=True, slots=True)
class TurnRequest:
    tenant: Tenant
    request_class: RequestClass
    model: str
    """By the name that its workers serve it by, out of a closed set: each has a queue of its own."""
    prompt_tokens: int
    """Of all prompts of the request together."""
    max_tokens: int
    """For one sequence."""
    sequences: int = 1
    deadline_s: float | None = None
    """On the router's clock; None: only the server's own, `request_timeout_s` from now."""
    is_upstream: bool = False
    """Workers elsewhere serve it: it is held to its tenant's limits, but waits for none of those here."""


class Admission:
    """Lives on one asyncio loop. Whoever places requests calls `poke` when workers may have room again."""

    def __init__(
        self,
        settings: RouterSettings,
        capacity: Capacity,
        metrics: AdmissionMetrics,
        clock: Clock = monotonic,
        limits: TenantLimits | None = None,
    ) -> None:
        self.is_closed = False
        self.metrics, self.expected_tokens = metrics, ExpectedTokens()
        self._settings, self._capacity, self._clock = settings, capacity, clock
        self._limits = limits or NoLimits()
        self._lines: dict[str, TurnLine] = {}
        self._requests: Counter[str] = Counter()
        """In flight here, by tenant: from asking for their turn until it is over."""
        self._places = Places(settings.requests_max, partial(metrics.refused, "places"))

    @property
    def in_flight(self) -> int:
        """Sequences that hold a place."""
        return self._places.in_flight

    @property
    def requests(self) -> Mapping[str, int]:
        """In flight here, by tenant."""
        return self._requests

    @property
    def waiting(self) -> int:
        """Requests in line, of all models."""
        return sum(len(line.queue) for line in self._lines.values())

    def enter(self) -> Place:
        """One sequence's place. Raises Overloaded when all are taken, Unavailable when closed."""
        self._check_open()
        return self._places.enter()

    async def turn(self, request: TurnRequest) -> "Turn":
        """Returns when the request may be placed, which the caller does before it awaits anything else; it closes the
        turn when the request is over. Does not let other tasks run where there is room and the tenant has no rate.

        Raises RateLimited past the tenant's own limits, Overloaded if the queue is full or would take too long,
        DeadlineExceeded if the deadline passes in line, Unavailable without a worker or when closed.
        """
        self._check_open()
        ask = self._ask(request)
        with ExitStack() as undo:
            self._count(request.tenant)
            undo.callback(self._uncount, request.tenant)
            if request.tenant.tokens_per_minute:
                await self._take_tokens(request.tenant, ask.tokens)
                undo.callback(self._limits.settle, request.tenant, -ask.tokens)
                self._check_open()
            if not request.is_upstream:
                await self._line(request.model).turn(ask)
            undo.pop_all()
        return Turn(self, request, ask)

    def poke(self, model: str | None = None) -> None:
        """Workers of the model, or of any, may have room again."""
        if model is None:
            for line in self._lines.values():
                line.poke()
        elif model in self._lines:
            self._lines[model].poke()

    def served_tokens(self) -> Mapping[Share, int]:
        """What was given here, ever."""
        return {
            Share(model, name, tenant): tokens
            for model, line in self._lines.items()
            for name in CLASSES
            for tenant, tokens in line.queue.served_tokens(name).items()
        }

    def served_elsewhere(self, tokens: Mapping[Share, int], weights: Mapping[str, float]) -> None:
        """What other routers have given since the last time; of models not asked for here yet nothing is kept."""
        for model, line in self._lines.items():
            for name in CLASSES:
                if given := {s.tenant: tokens[s] for s in tokens if s.model == model and s.request_class == name}:
                    line.queue.served_elsewhere(name, given, weights)

    def close(self) -> None:
        """Admits nobody any more, and sends away who waits for a turn."""
        self.is_closed = True
        for line in self._lines.values():
            line.close()

    async def idle(self) -> None:
        """Returns when nobody holds a place."""
        await self._places.idle()

    def _check_open(self) -> None:
        if self.is_closed:
            self.metrics.refused("closed")
            raise Unavailable("This router is shutting down; send the request to another.")

    def _ask(self, request: TurnRequest) -> Ask:
        tenant = request.tenant
        latest_s = self._clock() + self._settings.request_timeout_s
        expected = self.expected_tokens.of((request.model, tenant.name), request.max_tokens)
        return Ask(
            tenant.name,
            tenant.weight,
            request.request_class,
            max(1, request.prompt_tokens + request.sequences * expected),
            latest_s if request.deadline_s is None else min(request.deadline_s, latest_s),
        )

    def _line(self, model: str) -> TurnLine:
        if model not in self._lines:
            queue = TurnQueue(self._settings.queue_max)
            self._lines[model] = TurnLine(
                model, queue, self._capacity, self._settings.worker_queue_s, self.metrics, self._clock
            )
        return self._lines[model]

    async def _take_tokens(self, tenant: Tenant, tokens: int) -> None:
        wait_s = await self._limits.take(tenant, tokens)
        if wait_s:
            self.metrics.refused("rate", tenant.name)
            raise RateLimited(
                f"The limit of {tenant.tokens_per_minute} tokens a minute is reached; this request may be sent again "
                f"in {wait_s:.1f} s.",
                wait_s,
            )

    def _count(self, tenant: Tenant) -> None:
        most = tenant.requests_max
        if most and self._requests[tenant.name] + self._limits.requests_elsewhere(tenant) >= most:
            self.metrics.refused("concurrency", tenant.name)
            raise RateLimited(
                f"The limit of {most} requests at a time is reached; try again in a moment.", RETRY_AFTER_S
            )
        self._requests[tenant.name] += 1

    def _uncount(self, tenant: Tenant) -> None:
        self._requests[tenant.name] -= 1

    def _over(self, request: TurnRequest, ask: Ask, used_tokens: int) -> None:
        self._uncount(request.tenant)
        if not request.is_upstream:
            self._line(request.model).settle(ask, used_tokens)
        if request.tenant.tokens_per_minute:
            self._limits.settle(request.tenant, used_tokens - ask.tokens)
        self.metrics.used(request.tenant.name, used_tokens)
        generated = used_tokens - request.prompt_tokens
        if generated > 0 and not request.is_upstream:
            self.expected_tokens.observe((request.model, request.tenant.name), generated / request.sequences)


class Turn:
    """A request's right to be placed, and to its share until it is over."""

    def __init__(self, admission: Admission, request: TurnRequest, ask: Ask) -> None:
        self._admission, self._request, self._ask = admission, request, ask
        self._is_over = False

    def close(self, used_tokens: int) -> None:
        """The request is over: prompts and what was generated, in tokens; 0 if it was never placed. Idempotent."""
        if not self._is_over:
            self._is_over = True
            self._admission._over(self._request, self._ask, used_tokens)
