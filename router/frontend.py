"""What the HTTP and the gRPC door share: who asks, on what terms, and how a checked request becomes a generation."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

from baton.clock import Clock
from baton.cluster.worker_info import WorkerInfo
from baton.ids import RequestId
from baton.rpc import inference_pb2
from baton.settings import RouterSettings
from router.admission.admission import Admission, Turn, TurnRequest
from router.admission.request_class import RequestClass
from router.admission.tenants import Tenant, Tenants
from router.catalog import Catalog, ServedModel
from router.generation import Generation
from router.metrics import RouterMetrics
from router.request_id import SANE_ID
from router.sequence import SequenceRequest

SEED_BITS = 63
FORGOTTEN = (
    "No router that answers remembers this request: its id is another, it was never placed, or so many have been "
    "placed since that it is forgotten."
)
"""What to say where there is no decision to show."""


class Cluster(Protocol):
    """What the router knows of the others, workers and routers."""

    def members(self) -> Sequence[WorkerInfo]:
        """All workers, of whatever model and state."""

    def unready(self) -> str | None:
        """Why requests should rather go to another router now, whatever the model, as the end of a sentence."""

    def health(self) -> Mapping[str, Any]:
        """What an operator looks at, as JSON."""


FindDecision = Callable[[RequestId, str | None], Awaitable[inference_pb2.Decision | None]]
"""Asks the other routers, each with the Authorization header given; None where none remembers the request."""


@dataclass(frozen=True, slots=True)
class Frontend:
    settings: RouterSettings
    tenants: Tenants
    admission: Admission
    catalog: Catalog
    cluster: Cluster
    decision: Callable[[RequestId], inference_pb2.Decision | None]
    """This router's own; None where it does not remember the request."""
    peers_decision: FindDecision
    metrics: RouterMetrics
    clock: Clock
    wall_clock: Clock
    """Seconds since 1970."""
    draw_seed: Callable[[], int]
    """SEED_BITS random bits."""

    def unready(self) -> str | None:
        """Why no request can be served here now, as the end of a sentence."""
        if self.admission.is_closed:
            return "the router is shutting down"
        if not any(served.is_ready or served.upstream for served in self.catalog):
            return f"no decode worker is ready; known workers: {len(self.cluster.members())}"
        return self.cluster.unready()

    def cache_bytes_max(self, tenant: Tenant) -> int:
        """What the tenant's requests may have kept on each worker; 0: nothing."""
        return self.settings.cache_bytes_max if self.tenants.is_open else tenant.cache_bytes_max

    async def find_decision(
        self, request_id: RequestId, authorization: str | None, *, this_router_only: bool
    ) -> inference_pb2.Decision | None:
        """This router's, else another's; None where it is forgotten, or another tenant's. Raises Unauthorized."""
        tenant = self.tenants.authenticate(authorization)
        if not SANE_ID.fullmatch(request_id):
            return None
        decision = self.decision(request_id)
        if decision is None and not this_router_only:
            decision = await self.peers_decision(request_id, authorization)
        is_open_to = decision is not None and (self.tenants.is_open or decision.tenant == tenant.name)
        return decision if is_open_to else None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what beside the request itself says how it is to be served."""

    tenant: Tenant
    arrived_s: float
    deadline_s: float | None = None
    """Both on the router's clock; None: the caller sets none."""
    asked_class: RequestClass | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """A caller's request to one model."""

    frontend: Frontend
    caller: Caller
    served: ServedModel
    request_class: RequestClass

    @classmethod
    def of(
        cls, frontend: Frontend, caller: Caller, model: str | None, asked_class: RequestClass | None = None
    ) -> "Order":
        """Raises ModelNotFound if there is no such model or the tenant may not use it, InvalidRequest if it may not
        use the class. The caller's own word on the class goes before that of the request."""
        served = frontend.catalog.find(model, caller.tenant)
        return cls(frontend, caller, served, caller.tenant.class_of(caller.asked_class or asked_class))

    def sequences(
        self,
        prompts: Sequence[tuple[int, ...]],
        template: SequenceRequest,
        choices: int = 1,
        max_tokens_default: int | None = None,
    ) -> list[SequenceRequest]:
        """`choices` continuations of each prompt, in the order of the API's index, each with a seed of its own.

        The template says everything but prompt and choice; its sampling may lack `max_tokens` and `seed`, and its
        cache salt and its retention are those that the request asks for.

        Raises InvalidRequest if a prompt does not fit, or its KV is to be kept and may not be; Unavailable while no
        decode worker is ready.
        """
        tenant = self.caller.tenant
        facts = self.served.facts().limited(tenant.context_length_of(self.served.name), "the context of this API key")
        salt = tenant.cache_salt(template.cache_salt)
        retention = template.retention.owned(tenant.name, self.frontend.cache_bytes_max(tenant))
        requests = []
        for prompt in prompts:
            facts.check_prompt(prompt)
            sampling = facts.complete(template.sampling, len(prompt), self.frontend.draw_seed(), max_tokens_default)
            assert sampling.seed is not None
            for choice in range(choices):
                own = sampling.with_changes(seed=(sampling.seed + choice) % 2**64)
                requests.append(
                    replace(template, prompt=prompt, sampling=own, choice=choice, cache_salt=salt, retention=retention)
                )
        return requests

    async def start(
        self, request_id: RequestId, sequences: Sequence[SequenceRequest], held: AsyncExitStack
    ) -> Generation:
        """When it is the request's turn. What it holds from then on is given back as `held` closes.

        Raises what `Admission.turn` raises, and Unavailable if nobody can serve it.
        """
        caller = self.caller
        turn = await self.frontend.admission.turn(self._turn_request(sequences))
        generation: Generation | None = None

        def settle() -> None:
            turn.close(0 if generation is None else generation.usage.total_tokens)

        held.callback(settle)
        generation = self.served.generator.start(
            request_id, sequences, caller.arrived_s, caller.deadline_s, caller.tenant.name
        )
        held.callback(generation.close)
        return generation

    async def turn_upstream(self, prompt_tokens: int, max_tokens: int, sequences: int) -> Turn:
        """The right to send the request to the model's upstream; the numbers may be guesses. The caller closes it.

        Raises RateLimited past the tenant's own limits, Unavailable when the router is shutting down.
        """
        request = TurnRequest(
            self.caller.tenant,
            self.request_class,
            self.served.name,
            prompt_tokens,
            max_tokens,
            sequences,
            is_upstream=True,
        )
        return await self.frontend.admission.turn(request)

    def remaining_s(self) -> float:
        """Until the request is over, served or not; 0 at least."""
        now_s, caller = self.frontend.clock(), self.caller
        latest_s = caller.arrived_s + self.frontend.settings.request_timeout_s
        ends_s = latest_s if caller.deadline_s is None else min(latest_s, caller.deadline_s)
        return max(0.0, ends_s - now_s)

    def _turn_request(self, sequences: Sequence[SequenceRequest]) -> TurnRequest:
        return TurnRequest(
            self.caller.tenant,
            self.request_class,
            self.served.name,
            prompt_tokens=sum(len(sequence.prompt) for sequence in sequences if sequence.choice == 0),
            max_tokens=max(sequence.sampling.max_tokens or 0 for sequence in sequences),
            sequences=len(sequences),
            deadline_s=self.caller.deadline_s,
        )
