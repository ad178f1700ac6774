"""Steps that begin while what they read is still coming up, layer by layer, through a real model."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from engine_driver import EngineDriver
from fake_tiers import FakeTiers, HostRows
from tiny_models import CONTEXT_LENGTH, make_model, random_prompt, reference

from baton.ids import RequestId
from baton.latency import DEFAULT_LATENCY
from baton.layout import PROBE_BLOCKS
from engine.core import LocalEngine
from engine.digests import RegionDigester
from engine.interface import BlocksWritten, ModelInfo, Prefill
from engine.model.loader import LoadedModel, load_model
from engine.runner import ModelRunner, StepLogits, kv_layout
from engine.sampler import sample
from engine.scheduler import Limits
from kvtransfer.region import HostRegion

A, B = RequestId("a"), RequestId("b")
BLOCKS, BLOCK_TOKENS, LAYERS = 24, 8, 4
PROMPT, OTHER = random_prompt(61, seed=1), random_prompt(9, seed=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(directory: Path) -> LoadedModel:
    return load_model(str(directory), device="cpu", dtype="float32")


class Tiered(EngineDriver):
    """With all of PROMPT's whole blocks below HBM. Restores take what a test says, by a clock that only waiting
    moves."""

    def __init__(self, loaded: LoadedModel) -> None:
        layout = kv_layout(loaded, BLOCK_TOKENS, BLOCKS + PROBE_BLOCKS)
        region = HostRegion.allocate(layout)
        self.now_s = 100.0
        self.tiers = FakeTiers(HostRows(region), at_once=False)
        self.tiers.pass_time = self.pass_time
        self.sent: list[tuple[int, BlocksWritten, bytes]] = []
        self.region = region
        model = ModelInfo("tiny", "tiny", min(CONTEXT_LENGTH, BLOCKS * BLOCK_TOKENS), 211, frozenset({1}), layout)
        engine: LocalEngine[StepLogits] = LocalEngine(
            model,
            region,
            ModelRunner(loaded, region),
            lambda logits, draws: sample(logits.logits, draws),
            Limits(chunk_tokens=32, sequences_max=8, waiting_max=8),
            self._sent,
            clock=lambda: self.now_s,
            digester=RegionDigester(region),
            tiers=self.tiers,
        )
        super().__init__(engine)
        self.add("first", PROMPT)
        self.run()
        self.add("filler", random_prompt(8 * BLOCKS - 1, seed=3), salt="x", max_tokens=1)
        self.run()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    def _sent(self, layer: int, written: Sequence[BlocksWritten]) -> None:
        for event in written:
            blocks = self.admitted[event.request_id].blocks[event.first : event.end]
            views = [bytes(self.region.readable(layer, kv, block, 1)) for block in blocks for kv in (0, 1)]
            self.sent.append((layer, event, b"".join(views)))

    def begin(self, prefill: Prefill = Prefill.HERE) -> None:
        """The first layer of a's restore has landed, and the rest is said to come at once."""
        self.add("a", PROMPT, prefill)
        self.step()
        (restore,) = self.tiers.restores
        assert restore.layers == 0
        restore.left_s = 0.0
        restore.land()


@pytest.fixture
def tiered(loaded: LoadedModel) -> Iterator[Tiered]:
    torch.set_num_threads(1)
    driver = Tiered(loaded)
    try:
        yield driver
    finally:
        driver.engine.close()


def test_each_layer_waits_for_what_it_reads(tiered: Tiered, directory: Path) -> None:
    tiered.begin()
    tiered.step()
    (restore,) = tiered.tiers.restores
    assert restore.waited_for == [1, 2, 3]
    assert restore.result is not None, "the verdict came before the token"
    tiered.run()
    assert tiered.outputs[A] == reference(directory, PROMPT, 4)
    assert tiered.first[A].restored_tokens == 56
    tiered.assert_idle()


def test_no_step_begins_before_it_may(tiered: Tiered) -> None:
    tiered.begin()
    (restore,) = tiered.tiers.restores
    restore.left_s = 1.0
    tiered.step()
    assert not restore.waited_for and A not in tiered.outputs


def test_a_restore_that_stalls_holds_nobody_up_for_long(tiered: Tiered, directory: Path) -> None:
    tiered.add("b", OTHER, max_tokens=6)
    for _ in range(3):
        tiered.step()
    tiered.begin()
    (restore,) = tiered.tiers.restores
    restore.stalls = True
    before_s, decoded = tiered.now_s, len(tiered.outputs[B])
    result = tiered.step()
    assert tiered.now_s - before_s < 0.1
    assert len(tiered.outputs[B]) == decoded + 1, "the others' rows of the step are good"
    assert A not in tiered.outputs
    assert result.timing is None, "it is not how long computing takes"
    tiered.run()
    assert tiered.outputs[A] == reference(directory, PROMPT, 4)
    assert tiered.outputs[B] == reference(directory, OTHER, 6)
    assert tiered.first[A].cached_tokens == 0
    tiered.assert_idle()


@pytest.mark.parametrize("bad", [0, 4])
def test_what_turns_out_corrupt_is_neither_sampled_nor_published(tiered: Tiered, directory: Path, bad: int) -> None:
    tiered.add("b", OTHER, max_tokens=6)
    for _ in range(3):
        tiered.step()
    tiered.begin()
    (restore,) = tiered.tiers.restores
    tiered.tiers.corrupt = {restore.names[bad]}
    tiered.step()
    assert A not in tiered.outputs
    assert len(tiered.engine.hold(restore.names).blocks) == bad
    for request_id in (A, B):
        while request_id not in tiered.ended:
            tiered.step()
    assert tiered.outputs[A] == reference(directory, PROMPT, 4)
    assert tiered.outputs[B] == reference(directory, OTHER, 6)


def test_layers_are_sent_as_they_pass(tiered: Tiered, directory: Path) -> None:
    tiered.begin(Prefill.ONLY)
    result = tiered.step()
    restored, computed = BlocksWritten(A, 0, 7), BlocksWritten(A, 7, 8)
    assert [(layer, event) for layer, event, _ in tiered.sent if event.request_id == A] == [
        (layer, event) for layer in range(LAYERS) for event in (restored, computed)
    ]
    for layer, event, sent in tiered.sent:
        blocks = tiered.admitted[A].blocks[event.first : event.end]
        views = [bytes(tiered.region.readable(layer, kv, block, 1)) for block in blocks for kv in (0, 1)]
        assert sent == b"".join(views), "as it was when it was told, it has stayed"
    digests = [digest for part in result.digested for digest in part.digests]
    assert digests == tiered.region.digests(tiered.admitted[A].blocks)
    assert tiered.outputs[A] == reference(directory, PROMPT, 1)
    tiered.engine.release(A)
    tiered.run()
    tiered.assert_idle()


def test_a_committed_sequence_decodes_once_the_gate_lets_it(tiered: Tiered, directory: Path) -> None:
    """Its last block and first token come from elsewhere."""
    expected = reference(directory, PROMPT, 4)
    tiered.begin(Prefill.ELSEWHERE)
    tiered.engine.prefill_here(A)
    tiered.run()
    assert tiered.outputs[A] == expected


def test_decode_costs_are_what_the_rule_goes_by(tiered: Tiered) -> None:
    tiered.begin()
    (restore,) = tiered.tiers.restores
    step_s = DEFAULT_LATENCY.prefill.chunk_time_s(5, 58.5)
    restore.left_s = step_s * 3 / 4 * 1.01
    tiered.step()
    assert not restore.waited_for
    restore.left_s = step_s * 3 / 4 * 0.99
    tiered.tiers.wake()
    tiered.step()
    assert restore.waited_for
