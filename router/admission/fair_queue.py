"""Fair shares between tenants that wait for one resource: by weight, in tokens.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) with tokens as the cost, as in "Fairness in Serving
Large Language Models" (Sheng et al., OSDI 2024): who was given the fewest tokens for its weight is next. Over any time
in which tenants f and m both wait, what they are given for their weights differs by at most one request of each,
`|W_f / w_f - W_m / w_m| <= c_f / w_f + c_m / w_m`; settled estimates and what other routers gave are repaid besides.
A tenant that comes back from idling starts level with those that are there: no credit is saved up.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from router.admission.request_class import RequestClass


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that wants its turn."""

    tenant: str
    weight: float
    """The tenant's; above 0."""
    request_class: RequestClass
    tokens: int
    """Prompt and what it is expected to generate; at least 1."""
    deadline_s: float
    """On the queue's clock, and finite: nothing waits forever."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One that waits; what it is told by and taken out with."""

    ask: Ask
    number: int
    """Of its arrival."""
    since_s: float


@dataclass(slots=True)
class Account:
    """One tenant's."""

    weight: float
    virtual_time: float
    """Where its next request starts: tokens given to it for its weight, or where it joined."""
    waiting: list[Waiting] = field(default_factory=list)
    """By deadline, then arrival."""
    waiting_tokens: int = 0
    served_tokens: int = 0
    """Given to it here, ever."""

    @property
    def length(self) -> float:
        """Of its line, for its weight."""
        return len(self.waiting) / self.weight


class FairQueue:
    """Bounded by its owner. Tenants are a closed set: an account stays for ever."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._backlogged: dict[str, Account] = {}
        self._virtual_time = 0.0
        """Where the last one that was given its turn started."""
        self.waiting_tokens = 0

    def __len__(self) -> int:
        return sum(len(account.waiting) for account in self._backlogged.values())

    def __bool__(self) -> bool:
        return bool(self._backlogged)

    def __iter__(self) -> Iterator[Waiting]:
        for account in self._backlogged.values():
            yield from account.waiting

    @property
    def served_tokens(self) -> Mapping[str, int]:
        """Given here, ever, by tenant; settled to what was used where that is known."""
        return {tenant: account.served_tokens for tenant, account in self._accounts.items()}

    def add(self, waiting: Waiting) -> None:
        ask = waiting.ask
        account = self._account(ask.tenant, ask.weight)
        insort(account.waiting, waiting, key=_order)
        account.waiting_tokens += ask.tokens
        self.waiting_tokens += ask.tokens
        self._backlogged[ask.tenant] = account

    def remove(self, waiting: Waiting) -> bool:
        """False if it does not wait here."""
        tenant = waiting.ask.tenant
        account = self._backlogged.get(tenant)
        if account is None:
            return False
        place = bisect_left(account.waiting, _order(waiting), key=_order)
        if place == len(account.waiting) or account.waiting[place] is not waiting:
            return False
        del account.waiting[place]
        account.waiting_tokens -= waiting.ask.tokens
        self.waiting_tokens -= waiting.ask.tokens
        if not account.waiting:
            del self._backlogged[tenant]
        return True

    def head(self) -> Waiting | None:
        """Who is next."""
        if not self._backlogged:
            return None
        return min(self._backlogged.values(), key=_turn).waiting[0]

    def take(self, waiting: Waiting) -> None:
        """It has its turn, and waits no more."""
        removed = self.remove(waiting)
        assert removed, "does not wait here"
        self._charge(self._accounts[waiting.ask.tenant], waiting.ask.tokens)

    def start(self, ask: Ask) -> None:
        """It has its turn without having waited."""
        self._charge(self._account(ask.tenant, ask.weight), ask.tokens)

    def settle(self, ask: Ask, used_tokens: int) -> None:
        """What it was charged is put right."""
        account = self._accounts[ask.tenant]
        account.virtual_time += (used_tokens - ask.tokens) / account.weight
        account.served_tokens += used_tokens - ask.tokens

    def served_elsewhere(self, tokens: Mapping[str, int], weights: Mapping[str, float]) -> None:
        """Other routers gave these tenants so much since they last told; those without a weight are unknown here."""
        accounts = [(self._account(tenant, weights[tenant]), tokens[tenant]) for tenant in tokens if tenant in weights]
        for account, given in accounts:
            account.virtual_time += given / account.weight
        # Whoever joins next starts level with the least served of those that are active here or there.
        active = [*self._backlogged.values(), *(account for account, _ in accounts)]
        self._virtual_time = max(self._virtual_time, min((one.virtual_time for one in active), default=0.0))

    def tokens_ahead(self, ask: Ask) -> int:
        """Of those waiting, what would be given its turn before `ask` if nobody else came."""
        own = self._accounts.get(ask.tenant)
        own_ahead = sum(one.ask.tokens for one in own.waiting if one.ask.deadline_s <= ask.deadline_s) if own else 0
        started = own.virtual_time if own and own.waiting else max(self._virtual_time, own.virtual_time if own else 0.0)
        start = started + own_ahead / ask.weight
        others = (account for account in self._backlogged.values() if account is not own)
        return own_ahead + round(sum(_given_until(start, account) for account in others))

    def longest(self) -> str | None:
        """The tenant with the longest line for its weight."""
        return max(self._backlogged, key=lambda tenant: self._backlogged[tenant].length, default=None)

    def length_with(self, ask: Ask) -> float:
        """Of the tenant's line, for its weight, if `ask` joined."""
        account = self._backlogged.get(ask.tenant)
        return (1 + (len(account.waiting) if account else 0)) / ask.weight

    def length(self, tenant: str) -> float:
        account = self._backlogged.get(tenant)
        return account.length if account else 0.0

    def youngest(self, tenant: str) -> Waiting:
        """The last to come of a tenant that waits."""
        return max(self._backlogged[tenant].waiting, key=lambda waiting: waiting.number)

    def expired(self, now_s: float) -> list[Waiting]:
        """Whose deadline has passed."""
        return [
            waiting
            for account in self._backlogged.values()
            for waiting in account.waiting[: bisect_right(account.waiting, now_s, key=_deadline_s)]
        ]

    def check_integrity(self) -> None:
        for tenant, account in self._accounts.items():
            assert bool(account.waiting) == (tenant in self._backlogged)
            assert account.waiting == sorted(account.waiting, key=_order)
            assert account.waiting_tokens == sum(waiting.ask.tokens for waiting in account.waiting)
        assert self.waiting_tokens == sum(account.waiting_tokens for account in self._accounts.values())

    def _account(self, tenant: str, weight: float) -> Account:
        """Of one that is active from now on; its weight may have changed."""
        if (account := self._accounts.get(tenant)) is None:
            account = self._accounts[tenant] = Account(weight, self._virtual_time)
        if not account.waiting:
            account.virtual_time = max(account.virtual_time, self._virtual_time)
        account.weight = weight
        return account

    def _charge(self, account: Account, tokens: int) -> None:
        self._virtual_time = max(self._virtual_time, account.virtual_time)
        account.virtual_time += tokens / account.weight
        account.served_tokens += tokens


def _order(waiting: Waiting) -> tuple[float, int]:
    return waiting.ask.deadline_s, waiting.number


def _deadline_s(waiting: Waiting) -> float:
    return waiting.ask.deadline_s


def _turn(account: Account) -> tuple[float, int]:
    return account.virtual_time, account.waiting[0].number


def _given_until(virtual_time: float, account: Account) -> float:
    """Tokens that the account's line is given before a start at `virtual_time`."""
    return min(account.waiting_tokens, max(0.0, (virtual_time - account.virtual_time) * account.weight))
