"""A sequence's blocks that are on their way up from lower tiers, and when to wait for them and when not."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from baton.clock import Clock
from baton.ids import BlockHash
from kvcache.restore_plan import GRACE_S, keeps_ahead, overdue_s, should_give_up
from kvcache.tiers.interface import Restore, Restored


@dataclass(slots=True, eq=False)
class Restoring:
    """One sequence's restore. Between the blocks that it fills others may lie in HBM, which the sequence shares."""

    restore: Restore
    filled: tuple[int, ...]
    """Which of the sequence's blocks, ascending."""
    end: int
    """How many of the sequence's blocks need not be computed, once it is over."""
    began_s: float
    expected_s: float
    compute_s: float
    """What computing these blocks would have taken."""
    names: Sequence[BlockHash] = ()
    """Of the blocks that it fills."""
    is_void: bool = False
    """The prefix cache was cleared of these meanwhile: they are good for whoever restores them, and for nobody else."""
    check_s: float = field(init=False)
    """By the clock: when to see whether it has turned slow, though nothing is heard of it."""

    def __post_init__(self) -> None:
        self.check_s = self.began_s + self.expected_s + GRACE_S

    @property
    def is_over(self) -> bool:
        return self.restore.result is not None

    def is_too_slow(self, now_s: float) -> bool:
        if now_s >= self.check_s:
            self.check_s = now_s + GRACE_S
        return should_give_up(now_s - self.began_s, self.restore.left_s, self.expected_s, self.compute_s)

    def keeps_ahead(self, layers: int, step_s: float) -> bool:
        """Of a step of so many layers that begins now and takes so long."""
        return keeps_ahead(self.restore.layers, layers, self.restore.left_s, step_s)

    def right_blocks(self, restored: Restored) -> int:
        """How many of the sequence's first blocks hold what they should."""
        return self.end if restored.good == len(self.filled) else self.filled[restored.good]

    def shares_after(self, block: int) -> bool:
        """Whether some of the blocks from this one on are not the sequence's own."""
        return not set(self.filled).issuperset(range(block, self.end))


class NothingRestored:
    """Implements Restore, of blocks that went in the last moment."""

    left_s = 0.0
    result = Restored(0, (), (), "They were dropped to make room.")

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def wait_layer(self, layer: int, timeout_s: float) -> bool:
        del layer, timeout_s
        return True

    def wait(self, timeout_s: float) -> Restored:
        del timeout_s
        return self.result

    def cancel(self) -> None: ...


class RestoreGate:
    """Lets a forward pass come to a layer when all that its sequences have restored of it has landed.

    A restore that does not come in time is given up; the pass goes on, and what it computes of that sequence is good
    for nothing. So a pass is held up for OVERDUE_FACTOR times what its restores should take, and two GRACE_S, at most.
    """

    def __init__(self, restores: Iterable[Restoring], clock: Clock) -> None:
        self._restores = [restoring.restore for restoring in restores]
        self._clock, self.waited_s = clock, 0.0
        self._until_s = clock() + overdue_s(max((restore.left_s for restore in self._restores), default=0.0), 0.0)

    @property
    def has_restores(self) -> bool:
        return bool(self._restores)

    def wait_for(self, layer: int) -> None:
        late = [restore for restore in self._restores if restore.layers <= layer and restore.result is None]
        for restore in late:
            began_s = self._clock()
            if not restore.wait_layer(layer, max(0.0, self._until_s - began_s)):
                restore.cancel()
            self.waited_s += self._clock() - began_s

    def wait_for_all(self) -> None:
        """Every restore has ended when it returns: well, or badly."""
        for restore in self._restores:
            if restore.result is None and restore.wait(max(GRACE_S, self._until_s - self._clock())) is None:
                restore.cancel()

    def before(self, on_layer: Callable[[int], None] | None) -> Callable[[int], None] | None:
        """What is called with each layer: waits, then goes on to `on_layer`."""
        if not self._restores:
            return on_layer

        def wait_then_tell(layer: int) -> None:
            self.wait_for(layer)
            if on_layer is not None:
                on_layer(layer)

        return wait_then_tell


def next_check_s(restores: Sequence[Restoring]) -> float | None:
    """By the clock, when the first of them has to be looked at, though nothing is heard of it; None: never."""
    return min((restoring.check_s for restoring in restores), default=None)
