"""Who is next: the router's queue for one model, decided purely. Nothing here waits or knows what time it is.

The more urgent class goes first, and each less urgent one has a floor: of the tokens given to others while it waits
it is owed its share, and once it is owed what its next request costs, that one goes first. So a class's next request
waits for `cost / floor` tokens given to others at most, and one request more of each class. Within a class tenants have
fair shares by weight (fair_queue.py), and within a tenant the earliest deadline is first, then the earliest arrival.

The queue is bounded. When it is full a more urgent request takes the place of one of the least urgent class that waits,
and within a class the tenant with the longest line for its weight gives way to one with a shorter line; always the
youngest request goes. Who cannot be given its turn before its deadline is not taken in.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from router.admission.fair_queue import Ask, FairQueue, Waiting
from router.admission.request_class import CLASSES, RequestClass

FLOORS: Mapping[RequestClass, float] = {"interactive": 0.0, "standard": 0.10, "batch": 0.05}
"""Of the tokens that are given out while a class waits, the share that it is owed whatever is more urgent."""
RATE_HALF_LIFE_S = 10.0
RETRY_AFTER_S_MIN, RETRY_AFTER_S_MAX = 1.0, 60.0
RefusalReason = Literal["queue_full", "deadline"]


@dataclass(frozen=True, slots=True)
class Joined:
    waiting: Waiting
    displaced: Waiting | None
    """Who gave way, and is out of the queue."""


@dataclass(frozen=True, slots=True)
class Refused:
    reason: RefusalReason
    wait_s: float
    """Predicted, for its turn."""
    retry_after_s: float


@dataclass(slots=True)
class GivenRate:
    """Tokens given out a second while others wait, over the last RATE_HALF_LIFE_S or so."""

    tokens: float = 0.0
    seconds: float = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """So many were given after so long."""
        keep = 0.5 ** (seconds / RATE_HALF_LIFE_S)
        self.tokens = self.tokens * keep + tokens
        self.seconds = self.seconds * keep + seconds

    def time_s(self, tokens: float, stalled_s: float) -> float:
        """Until so many more are given, when none were for `stalled_s`; 0 where nothing is known yet."""
        return tokens * (self.seconds + stalled_s) / self.tokens if self.tokens else 0.0


class TurnQueue:
    """The owner says when there is room (`release`), and what a request used in the end (`settle`)."""

    def __init__(self, waiting_max: int) -> None:
        """At most so many wait; 0: none."""
        self._waiting_max = waiting_max
        self._classes = {name: FairQueue() for name in CLASSES}
        self._owed = dict.fromkeys(CLASSES, 0.0)
        """Tokens, to each class that waits."""
        self._rate = GivenRate()
        self._busy_since_s = 0.0
        """The last release, or when the queue was empty before."""
        self._arrivals = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Waiting]:
        for name in CLASSES:
            yield from self._classes[name]

    def length(self, request_class: RequestClass) -> int:
        return len(self._classes[request_class])

    def served_tokens(self, request_class: RequestClass) -> Mapping[str, int]:
        """Given by this queue, ever, by tenant."""
        return self._classes[request_class].served_tokens

    def start(self, ask: Ask) -> None:
        """It has its turn at once; only while nobody waits."""
        assert not self._length, "others are before it"
        self._classes[ask.request_class].start(ask)

    def join(self, ask: Ask, now_s: float, worker_s: float) -> Joined | Refused:
        """`worker_s` is what it will wait after its turn."""
        wait_s = self.wait_s(ask, now_s)
        late_s = now_s + wait_s + worker_s - ask.deadline_s
        if late_s >= 0:
            return Refused("deadline", wait_s, _bounded(late_s))
        displaced = self._place_for(ask)
        if self._length >= self._waiting_max and displaced is None:
            return Refused("queue_full", wait_s, self.retry_after_s(now_s))
        if displaced is not None:
            self.leave(displaced)
        return Joined(self._add(ask, now_s), displaced)

    def leave(self, waiting: Waiting) -> bool:
        """It waits no more, and had no turn. False if it does not wait here."""
        if not self._classes[waiting.ask.request_class].remove(waiting):
            return False
        self._left(waiting.ask.request_class)
        return True

    def release(self, now_s: float) -> Waiting | None:
        """There is room for one: who has its turn, and is out of the queue. None if nobody waits."""
        waiting = self._next()
        if waiting is None:
            return None
        name = waiting.ask.request_class
        self._rate.observe(waiting.ask.tokens, self._stalled_s(now_s))
        self._busy_since_s = now_s
        self._classes[name].take(waiting)
        self._owe(name, waiting.ask.tokens)
        self._left(name)
        return waiting

    def expire(self, now_s: float) -> list[Waiting]:
        """Those whose deadline has passed; they are out of the queue."""
        expired = [waiting for name in CLASSES for waiting in self._classes[name].expired(now_s)]
        for waiting in expired:
            self.leave(waiting)
        return expired

    def settle(self, ask: Ask, used_tokens: int) -> None:
        """One that had its turn used so many, rather than what it asked for; 0: it was for nothing."""
        self._classes[ask.request_class].settle(ask, used_tokens)

    def served_elsewhere(
        self, request_class: RequestClass, tokens: Mapping[str, int], weights: Mapping[str, float]
    ) -> None:
        """Other routers gave these tenants so much since they last told."""
        self._classes[request_class].served_elsewhere(tokens, weights)

    def wait_s(self, ask: Ask, now_s: float) -> float:
        """Predicted until its turn, from what is ahead of it and the rate seen."""
        return self._rate.time_s(self._tokens_ahead(ask), self._stalled_s(now_s)) if self._length else 0.0

    def retry_after_s(self, now_s: float) -> float:
        """For who is sent away: when all that waits now will have had its turn."""
        return _bounded(self._rate.time_s(self._tokens, self._stalled_s(now_s)))

    def check_integrity(self) -> None:
        for name in CLASSES:
            self._classes[name].check_integrity()
            assert self._owed[name] >= 0.0
            assert self._classes[name] or not self._owed[name]
        assert self._length == sum(map(len, self._classes.values())) <= self._waiting_max

    @property
    def _tokens(self) -> int:
        return sum(one.waiting_tokens for one in self._classes.values())

    def _stalled_s(self, now_s: float) -> float:
        return max(0.0, now_s - self._busy_since_s) if self._length else 0.0

    def _add(self, ask: Ask, now_s: float) -> Waiting:
        if not self._length:
            self._busy_since_s = now_s
        waiting = Waiting(ask, self._arrivals, now_s)
        self._arrivals += 1
        self._length += 1
        self._classes[ask.request_class].add(waiting)
        return waiting

    def _left(self, name: RequestClass) -> None:
        self._length -= 1
        if not self._classes[name]:
            self._owed[name] = 0.0

    def _next(self) -> Waiting | None:
        heads = [head for name in CLASSES if (head := self._classes[name].head()) is not None]
        due = (head for head in heads[1:] if self._owed[head.ask.request_class] >= head.ask.tokens)
        return next(due, heads[0] if heads else None)

    def _owe(self, served: RequestClass, tokens: int) -> None:
        """Who was passed over is owed its share, and who was served is owed less."""
        for name in CLASSES:
            if name == served:
                self._owed[name] = max(0.0, self._owed[name] - tokens)
            elif self._classes[name]:
                self._owed[name] += FLOORS[name] * tokens

    def _tokens_ahead(self, ask: Ask) -> float:
        place = CLASSES.index(ask.request_class)
        same = self._classes[ask.request_class].tokens_ahead(ask)
        ahead: float = same + sum(self._classes[name].waiting_tokens for name in CLASSES[:place])
        if floor := FLOORS[ask.request_class]:
            ahead = min(ahead, (same + ask.tokens) / floor)
        return ahead / (1.0 - sum(FLOORS[name] for name in CLASSES[place + 1 :] if self._classes[name]))

    def _place_for(self, ask: Ask) -> Waiting | None:
        """Who would give way to it in a full queue, if anybody."""
        if self._length < self._waiting_max or not self._length:
            return None
        least = next(name for name in reversed(CLASSES) if self._classes[name])
        line = self._classes[least]
        longest = line.longest()
        assert longest is not None
        is_more_urgent = CLASSES.index(ask.request_class) < CLASSES.index(least)
        is_shorter = ask.request_class == least and line.length(longest) > line.length_with(ask)
        return line.youngest(longest) if is_more_urgent or is_shorter else None


def _bounded(retry_after_s: float) -> float:
    return min(max(retry_after_s, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)
