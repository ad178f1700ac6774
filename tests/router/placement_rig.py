"""Workers, prompts and a placer for tests of placement."""

from collections.abc import Sequence
from random import Random

from baton.clock import ManualClock
from baton.cluster.worker_info import Load, Role, WorkerInfo
from baton.ids import BlockHash, WorkerId
from baton.latency import DecodeCost, PrefillCost, TransferCost, WorkerLatency
from baton.settings import Policy
from router.index.prefix_index import PrefixIndex
from router.placement.block_names import BlockKind
from router.placement.decision import Decision
from router.placement.placer import Placer
from router.placement.price import PlacementRequest

BLOCK_TOKENS = 16
LATENCY = WorkerLatency(
    PrefillCost(chunk_s=0.005, token_s=5e-5, token_context_s=1e-9),
    DecodeCost(step_s=0.01, sequence_s=1e-4, kv_token_s=1e-7),
    TransferCost(latency_s=0.001, bytes_per_s=1e10),
)


def slowed(factor: float, latency: WorkerLatency = LATENCY) -> WorkerLatency:
    prefill, decode = latency.prefill, latency.decode
    return WorkerLatency(
        PrefillCost(factor * prefill.chunk_s, factor * prefill.token_s, factor * prefill.token_context_s),
        DecodeCost(factor * decode.step_s, factor * decode.sequence_s, factor * decode.kv_token_s),
        latency.transfer,
        latency.restore,
    )


def a_worker(
    name: str,
    role: Role = "decode",
    *,
    latency: WorkerLatency = LATENCY,
    load: Load | None = None,
    epoch: str = "1",
    model: str = "m",
    fingerprint: str = "f",
    blocks: int = 100_000,
    sequences_max: int = 256,
    pool: str = "default",
    block_tokens: int = BLOCK_TOKENS,
    fetches: bool = False,
) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        role=role,
        state="ready",
        address=f"{name}:1",
        model=model,
        fingerprint=fingerprint,
        context_length=1 << 20,
        vocabulary_size=1000,
        block_tokens=block_tokens,
        kv_dtype="float32",
        kv_blocks_total=blocks,
        kv_block_bytes=block_tokens * 100_000,
        sequences_max=sequences_max,
        pool=pool,
        fetches=fetches,
        latency=latency,
        epoch=epoch,
        load=load or Load(),
    )


BUSY = Load(running_sequences=40, kv_tokens=40_000, kv_blocks_used=2500)
"""A decode worker with others on it, for whom its computing a prompt itself would be a wait."""


def a_fleet(prefill: int, decode: int) -> list[WorkerInfo]:
    return [
        *(a_worker(f"p{number}", "prefill") for number in range(prefill)),
        *(a_worker(f"d{number}", load=BUSY) for number in range(decode)),
    ]


def a_request(
    tokens: int, prompt: object = 0, *, expected_tokens: float = 100, model: str = "m", shared_blocks: int = 0
) -> PlacementRequest:
    """Prompts of one name are the same tokens; those that differ share their first `shared_blocks` at most."""
    blocks = tokens // BLOCK_TOKENS
    names = [BlockHash(_name("shared" if block < shared_blocks else prompt, block)) for block in range(blocks)]

    def names_of(kind: BlockKind) -> Sequence[BlockHash]:
        del kind
        return names

    return PlacementRequest(model, tokens, expected_tokens, names_of)


def _name(prompt: object, block: int) -> bytes:
    return Random(f"{prompt}/{block}").randbytes(16)


class Rig:
    """A placer, and what it stands on."""

    def __init__(self, workers: Sequence[WorkerInfo], policy: Policy = "least-added-latency", seed: int = 0) -> None:
        self.clock = ManualClock(100.0)
        self.index = PrefixIndex(100_000, self.clock)
        self.placer = Placer(self.index, policy, self.clock, Random(seed))
        self.placer.set_workers(workers)
        self._sequences = 0

    def place(self, request: PlacementRequest) -> tuple[int, Decision]:
        """Placed and reserved: the sequence's id and the decision."""
        decision = self.placer.place(request)
        self._sequences += 1
        self.placer.reserve(self._sequences, decision, request)
        return self._sequences, decision

    def serve(self, request: PlacementRequest) -> Decision:
        """Placed, and finished at once."""
        sequence_id, decision = self.place(request)
        self.placer.finished(sequence_id)
        return decision

    def hold(self, worker_id: str, request: PlacementRequest, blocks: int | None = None) -> None:
        """The worker has the prompt's first blocks in its cache."""
        names = request.names(BlockKind("f", BLOCK_TOKENS, "float32"))
        self.index.expect([WorkerId(worker_id)], names[:blocks])


def pair_of(decision: Decision) -> tuple[str | None, str]:
    prefill = decision.chosen.prefill
    return (prefill.worker_id if prefill else None, decision.chosen.decode.worker_id)
