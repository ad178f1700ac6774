"""Which workers serve a request: the pair with the fewest tokens before and on it.

Costs are in tokens, and a lower one is better. Pure: what is known comes in, a decision goes out.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baton.cluster.worker_info import WorkerInfo
from baton.errors import Unavailable
from baton.ids import BlockHash, RequestId, WorkerId
from kvcache.block_hash import block_hashes, root_hash

PREFILL_CANDIDATES_MAX = 3
BELIEVED_BLOCKS_MAX = 1 << 17
"""Block hashes remembered: about 4 million tokens' worth at 32 tokens a block, in some 40 MB."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker and what speaks against it."""

    worker: WorkerInfo
    waiting_tokens: int
    """Prompt tokens of others, to be computed there before this one's."""
    held_tokens: int
    """Decode: KV that every step there reads already."""
    missing_tokens: int
    """Prompt tokens that are not believed to be in its prefix cache."""
    has_room: bool
    """Decode: the prompt's KV fits without anybody waiting."""

    @property
    def cost_tokens(self) -> int:
        return self.waiting_tokens + self.held_tokens + self.missing_tokens

    @property
    def rank(self) -> tuple[bool, int, int, WorkerId]:
        return (not self.has_room, self.cost_tokens, self.worker.load.running_sequences, self.worker.worker_id)


@dataclass(frozen=True, slots=True)
class Placement:
    decode: Candidate
    prefill: tuple[Candidate, ...]
    """Best first; empty: the decode worker prefills itself."""
    rejected: tuple[Candidate, ...]
    """The decode workers that were not chosen."""
    prompt_tokens: int
    blocks: tuple[BlockHash, ...]
    """The prompt's whole blocks."""


class InFlight:
    """What this router has placed and not seen the end of."""

    def __init__(self) -> None:
        self._placed: dict[RequestId, Placement] = {}
        self._computing: dict[RequestId, Candidate] = {}
        self._waiting_tokens: Counter[WorkerId] = Counter()
        self._held_tokens: Counter[WorkerId] = Counter()

    def started(self, request_id: RequestId, placement: Placement) -> None:
        computing = placement.prefill[0] if placement.prefill else placement.decode
        self._placed[request_id], self._computing[request_id] = placement, computing
        self._waiting_tokens[computing.worker.worker_id] += computing.missing_tokens
        self._held_tokens[placement.decode.worker.worker_id] += placement.prompt_tokens

    def prefilled(self, request_id: RequestId) -> None:
        """Idempotent: the first token has come."""
        if computing := self._computing.pop(request_id, None):
            self._subtract(self._waiting_tokens, computing.worker.worker_id, computing.missing_tokens)

    def finished(self, request_id: RequestId) -> None:
        """Idempotent."""
        self.prefilled(request_id)
        if placement := self._placed.pop(request_id, None):
            self._subtract(self._held_tokens, placement.decode.worker.worker_id, placement.prompt_tokens)

    def waiting_tokens(self, worker: WorkerInfo) -> int:
        """The greater of what the worker reported, which is up to a heartbeat old, and what this router knows:
        both count this router's requests, so their sum would count them twice."""
        return max(worker.load.waiting_tokens, self._waiting_tokens[worker.worker_id])

    def held_tokens(self, worker: WorkerInfo) -> int:
        return max(worker.load.kv_blocks_used * worker.block_tokens, self._held_tokens[worker.worker_id])

    @staticmethod
    def _subtract(counter: Counter[WorkerId], worker_id: WorkerId, tokens: int) -> None:
        counter[worker_id] -= tokens
        if not counter[worker_id]:
            del counter[worker_id]  # workers come and go; the counters must not grow with them


class PrefixBelief:
    """Which blocks lie where, guessed from this router's own placements; the oldest guesses go first."""

    def __init__(self, blocks_max: int = BELIEVED_BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._holders: OrderedDict[BlockHash, frozenset[str]] = OrderedDict()

    def learn(self, placement: Placement) -> None:
        """Both workers will hold the whole prompt."""
        workers = (placement.decode, *placement.prefill[:1])
        lives = frozenset(_life(candidate.worker) for candidate in workers)
        for block in reversed(placement.blocks):  # so that a prefix outlives what follows it
            self._holders[block] = self._holders.get(block, frozenset()) | lives
            self._holders.move_to_end(block)
        while len(self._holders) > self._blocks_max:
            self._holders.popitem(last=False)

    def cached_blocks(self, worker: WorkerInfo, blocks: Iterable[BlockHash]) -> int:
        """How long a prefix the worker holds."""
        life, count = _life(worker), 0
        for block in blocks:
            if life not in self._holders.get(block, ()):
                break
            count += 1
        return count


@dataclass(slots=True)
class Placer:
    in_flight: InFlight = field(default_factory=InFlight)
    belief: PrefixBelief = field(default_factory=PrefixBelief)

    def place(self, prompt: Sequence[int], cache_salt: str, workers: Sequence[WorkerInfo]) -> Placement:
        """Chooses among workers of the request's model, all fit to take it.

        Raises Unavailable if none of them decodes.
        """
        hashes = _Hashes(prompt, cache_salt)
        decode = self._ranked([worker for worker in workers if worker.role == "decode"], hashes)
        if not decode:
            raise Unavailable("No decode worker is ready to serve this model now; try again in a while.")
        chosen = decode[0]
        prefill = self._ranked([worker for worker in workers if _prefills_for(worker, chosen.worker)], hashes)
        candidates = tuple(prefill[:PREFILL_CANDIDATES_MAX])
        return Placement(chosen, candidates, tuple(decode[1:]), len(prompt), hashes.of(chosen.worker))

    def started(self, request_id: RequestId, placement: Placement) -> None:
        self.in_flight.started(request_id, placement)
        self.belief.learn(placement)

    def _ranked(self, workers: Sequence[WorkerInfo], hashes: "_Hashes") -> list[Candidate]:
        candidates = (self._candidate(worker, hashes) for worker in workers)
        return sorted(candidates, key=lambda candidate: candidate.rank)

    def _candidate(self, worker: WorkerInfo, hashes: "_Hashes") -> Candidate:
        prompt_tokens = len(hashes.prompt)
        cached_tokens = self.belief.cached_blocks(worker, hashes.of(worker)) * worker.block_tokens
        decodes = worker.role == "decode"
        held_tokens = self.in_flight.held_tokens(worker) if decodes else 0
        return Candidate(
            worker,
            waiting_tokens=self.in_flight.waiting_tokens(worker),
            held_tokens=held_tokens,
            missing_tokens=max(prompt_tokens - cached_tokens, 1),  # the last token is always computed
            has_room=held_tokens + prompt_tokens <= worker.kv_blocks_total * worker.block_tokens,
        )


class _Hashes:
    """A prompt's block names, which depend on the model's fingerprint and the size of its blocks."""

    def __init__(self, prompt: Sequence[int], cache_salt: str) -> None:
        self.prompt, self._cache_salt = prompt, cache_salt
        self._known: dict[tuple[str, int], tuple[BlockHash, ...]] = {}

    def of(self, worker: WorkerInfo) -> tuple[BlockHash, ...]:
        key = (worker.fingerprint, worker.block_tokens)
        if key not in self._known:
            root = root_hash(worker.fingerprint, worker.block_tokens, worker.kv_dtype, cache_salt=self._cache_salt)
            self._known[key] = tuple(block_hashes(root, self.prompt, worker.block_tokens))
        return self._known[key]


def _prefills_for(worker: WorkerInfo, decode: WorkerInfo) -> bool:
    return worker.role == "prefill" and worker.fingerprint == decode.fingerprint


def _life(worker: WorkerInfo) -> str:
    """A worker from one start to the next: its cache does not outlive it."""
    return f"{worker.worker_id}/{worker.epoch}"
