"""An engine over a toy model whose next token depends on every KV entry it reads, and on where it reads them.

The keys and values of a token are a digest of the token, its position and the entry before it, *read from
the store through the block table*: a wrong, stale or overwritten block shows as a wrong token.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine_driver import EngineDriver

from baton.clock import Clock, monotonic
from baton.ids import BlockId, RequestId
from baton.layout import PROBE_BLOCKS, KVLayout
from baton.sampling import PositionLogprobs, SamplingParams, TokenLogprob
from engine.batch import Draw, Drawn, Row
from engine.core import LocalEngine
from engine.digests import Digester, RegionDigester
from engine.interface import LayerListener, ModelInfo
from engine.scheduler import Limits
from kvcache.tiers.interface import LowerTiers

VOCABULARY_SIZE = 50
EOS_TOKEN_ID = 0
Entry = bytes


def entry_of(previous: Entry, token: int, position: int) -> Entry:
    return hashlib.blake2b(previous + bytes([token]) + position.to_bytes(4, "little"), digest_size=8).digest()


def next_token(entries: Sequence[Entry], forbidden: frozenset[int] = frozenset()) -> int:
    """Of all entries, in the order of the positions."""
    digest = hashlib.blake2b(b"".join(entries), digest_size=8).digest()
    tokens = [(int.from_bytes(digest, "little") + i) % VOCABULARY_SIZE for i in range(VOCABULARY_SIZE)]
    return next(token for token in tokens if token not in forbidden)


def toy_entries(tokens: Sequence[int]) -> list[Entry]:
    entries: list[Entry] = []
    for token in tokens:
        entries.append(entry_of(entries[-1] if entries else b"", token, len(entries)))
    return entries


def toy_reference(prompt: Sequence[int], sampling: SamplingParams, context_length: int) -> list[int]:
    """What the toy model continues the prompt with, by itself and without any engine."""
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS_TOKEN_ID})
    output: list[int] = []
    while True:
        forbidden = frozenset(stops) if len(output) < sampling.min_tokens else frozenset[int]()
        output.append(next_token(toy_entries([*prompt, *output]), forbidden))
        room = min(sampling.max_tokens or context_length, context_length - len(prompt))
        if output[-1] in stops or len(output) >= room:
            return output


@dataclass(frozen=True, slots=True)
class ToyLogits:
    contexts: tuple[tuple[Entry, ...], ...]
    prompt_logprobs: tuple[tuple[PositionLogprobs, ...], ...]

    def only(self, rows: Sequence[int], sampled: Sequence[int]) -> "ToyLogits":
        return ToyLogits(tuple(self.contexts[i] for i in sampled), tuple(self.prompt_logprobs[i] for i in rows))


class ToyRegion:
    """`entries[block][slot]`; two engines' regions can be copied by block."""

    is_host = True

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.entries: list[list[Entry]] = [[b"unwritten"] * layout.block_tokens for _ in range(layout.blocks)]
        self.is_closed = False

    def copy_blocks(self, source: "ToyRegion", pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        for here, there in pairs:
            self.entries[here] = list(source.entries[there])

    def digests(self, blocks: Sequence[BlockId]) -> list[int]:
        return [int.from_bytes(entry_of(b"".join(self.entries[block]), 0, 0), "little") for block in blocks]

    def close(self) -> None:
        self.is_closed = True


class ToyRunner:
    """Computes rows; fails the next steps that `fail_next` counts."""

    def __init__(self, region: ToyRegion) -> None:
        self.region = region
        self.fail_next = 0
        self.steps: list[tuple[Row, ...]] = []

    def forward(self, rows: Sequence[Row], on_layer: Callable[[int], None] | None) -> ToyLogits:
        self.steps.append(tuple(rows))
        if self.fail_next:
            self.fail_next -= 1
            raise MemoryError
        for row in rows:
            self._write(row)
        for layer in range(self.region.layout.layers):
            if on_layer:
                on_layer(layer)
        contexts = tuple(tuple(self._read(row)) for row in rows if row.samples)
        return ToyLogits(contexts, tuple(map(_prompt_logprobs, rows)))

    def _write(self, row: Row) -> None:
        for position, token in enumerate(row.token_ids, row.start):
            previous = self._entry(row, position - 1) if position else b""
            block, slot = self._place(row, position)
            self.region.entries[block][slot] = entry_of(previous, token, position)

    def _read(self, row: Row) -> Iterator[Entry]:
        return (self._entry(row, position) for position in range(row.start + len(row.token_ids)))

    def _entry(self, row: Row, position: int) -> Entry:
        block, slot = self._place(row, position)
        return self.region.entries[block][slot]

    def _place(self, row: Row, position: int) -> tuple[BlockId, int]:
        index, slot = divmod(position, self.region.layout.block_tokens)
        return row.blocks[index], slot

    def close(self) -> None:
        assert not self.region.is_closed


def _prompt_logprobs(row: Row) -> tuple[PositionLogprobs, ...]:
    """One for each token of the row whose successor is known: just that successor, under a made-up number."""
    if row.prompt_logprobs is None:
        return ()
    successors = (*row.token_ids[1:], *(() if row.next_token is None else (row.next_token,)))
    return tuple((TokenLogprob(token, -1.0),) for token in successors)


def toy_sample(logits: ToyLogits, draws: Sequence[Draw]) -> list[Drawn]:
    assert len(logits.contexts) == len(draws)
    drawn = []
    for entries, draw in zip(logits.contexts, draws, strict=True):
        assert len(entries) == len(draw.prompt) + len(draw.output)
        token = next_token(entries, draw.forbidden)
        drawn.append(Drawn(token, () if draw.params.logprobs is None else (TokenLogprob(token, -0.5),)))
    return drawn


@dataclass
class ToyEngine(EngineDriver):
    """A LocalEngine over the toy model, with what tests want to see of it. `blocks` are the pool's."""

    blocks: int = 16
    block_tokens: int = 4
    limits: Limits = field(default_factory=lambda: Limits(chunk_tokens=8, sequences_max=8, waiting_max=64))
    context_length: int | None = None
    listener: LayerListener | None = None
    clock: Clock = monotonic
    makes_digests: bool = True
    digester: Digester | None = None
    """Instead of the region's own."""
    tiers: Callable[["ToyRegion"], LowerTiers] | None = None

    def __post_init__(self) -> None:
        layout = KVLayout(2, self.blocks + PROBE_BLOCKS, self.block_tokens, 1, 1, "float32")
        pool_tokens = self.blocks * self.block_tokens
        self.region = ToyRegion(layout)
        self.runner = ToyRunner(self.region)
        self.model = ModelInfo(
            name="toy",
            fingerprint="toy",
            context_length=self.context_length or pool_tokens,
            vocabulary_size=VOCABULARY_SIZE,
            eos_token_ids=frozenset({EOS_TOKEN_ID}),
            layout=layout,
        )
        engine = LocalEngine(
            self.model,
            self.region,  # type: ignore[arg-type]
            self.runner,
            toy_sample,
            self.limits,
            self.listener,
            seeds=lambda: 7,
            clock=self.clock,
            digester=(self.digester or RegionDigester(self.region)) if self.makes_digests else None,  # type: ignore[arg-type]
            tiers=self.tiers(self.region) if self.tiers else None,
        )
        EngineDriver.__init__(self, engine)

    def stored(self, request_id: RequestId, tokens: int) -> list[Entry]:
        """What lies in the blocks that the request was admitted with."""
        blocks = self.admitted[request_id].blocks
        return [self.region.entries[blocks[i // self.block_tokens]][i % self.block_tokens] for i in range(tokens)]
