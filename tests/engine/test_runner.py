"""The runner against transformers' own greedy generate, token for token, with hand-made block tables."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from baton.ids import BlockId, RequestId
from engine.batch import Row
from engine.model.loader import LoadedModel, load_model
from engine.runner import ModelRunner, blocks_for_memory, kv_layout, region_tensor
from kvtransfer.region import HostRegion
from tests.engine.tiny_models import CONTEXT_LENGTH, FAMILIES, SLIDING_WINDOW, make_model, random_prompt, reference

BLOCK_TOKENS, BLOCKS, NEW_TOKENS = 4, 256, 16
PROMPT_LENGTHS = (3, SLIDING_WINDOW, 45)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, directories: dict[str, Path]) -> "Family":
    directory = directories[request.param]
    return Family(directory, load_model(str(directory), device="cpu"))


@dataclass(frozen=True)
class Family:
    directory: Path
    loaded: LoadedModel


@pytest.fixture
def runner(family: Family) -> Iterator[ModelRunner]:
    yield from open_runner(family.loaded)


def open_runner(loaded: LoadedModel) -> Iterator[ModelRunner]:
    region = HostRegion.allocate(kv_layout(loaded, BLOCK_TOKENS, BLOCKS))
    runner = ModelRunner(loaded, region)
    yield runner
    runner.close()
    region.close()


@dataclass
class Request:
    """A request by hand: its tokens, how many are computed, and its share of the pool."""

    tokens: list[int]
    blocks: list[BlockId]
    chunk: int
    computed: int = 0
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def next_row(self) -> Row:
        tokens = tuple(self.tokens[self.computed : self.computed + self.chunk])
        samples = self.computed + len(tokens) == len(self.tokens)
        return Row(RequestId("r"), tokens, self.computed, self.blocks, samples)


def sequences(prompts: Sequence[Sequence[int]], chunks: Sequence[int], seed: int | None) -> list[Request]:
    """Each with its own blocks: adjacent ones, or scattered over the pool by the seed."""
    ids = [BlockId(block) for block in range(BLOCKS)]
    if seed is not None:
        random.Random(seed).shuffle(ids)
    share = BLOCKS // len(prompts)
    return [
        Request(list(prompt), ids[i * share : (i + 1) * share], chunk)
        for i, (prompt, chunk) in enumerate(zip(prompts, chunks, strict=True))
    ]


def generate(runner: ModelRunner, batch: Sequence[Request], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy, all in one batch; a sequence that has what it wants leaves it."""
    while live := [sequence for sequence in batch if len(sequence.output) < new_tokens]:
        rows = [sequence.next_row() for sequence in live]
        drawn = iter(runner.forward(rows).logits.argmax(-1).tolist())
        for sequence, row in zip(live, rows, strict=True):
            sequence.computed += len(row.token_ids)
            if row.samples:
                sequence.tokens.append(next(drawn))
    return [sequence.output for sequence in batch]


@pytest.mark.parametrize("chunk", [CONTEXT_LENGTH, 16, 5, 1])
def test_alone_in_chunks(family: Family, runner: ModelRunner, chunk: int) -> None:
    for length in PROMPT_LENGTHS:
        prompt = random_prompt(length, seed=length)
        [output] = generate(runner, sequences([prompt], [chunk], seed=None))
        assert output == reference(family.directory, prompt, NEW_TOKENS)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_batch_that_mixes_prefill_and_decode(family: Family, runner: ModelRunner, seed: int | None) -> None:
    prompts = [random_prompt(length, seed=length) for length in (1, 40, 8, 45, 24, 25, 3)]
    outputs = generate(runner, sequences(prompts, [1, 16, 3, CONTEXT_LENGTH, 5, 7, 1], seed))
    assert outputs == [reference(family.directory, prompt, NEW_TOKENS) for prompt in prompts]


def test_outputs_are_diverse_enough_to_tell_a_wrong_block(family: Family, runner: ModelRunner) -> None:
    prompt = random_prompt(40)
    expected = reference(family.directory, prompt, NEW_TOKENS)
    assert len(set(expected)) >= NEW_TOKENS // 2
    [wrong] = sequences([prompt], [CONTEXT_LENGTH], seed=None)
    generate(runner, [wrong], new_tokens=1)
    wrong.blocks[8] = wrong.blocks[7]
    assert generate(runner, [wrong]) != [expected]


# ---- one family is enough for the rest


@pytest.fixture(scope="module")
def llama(directories: dict[str, Path]) -> LoadedModel:
    return load_model(str(directories["llama"]), device="cpu")


@pytest.fixture
def llama_runner(llama: LoadedModel) -> Iterator[ModelRunner]:
    yield from open_runner(llama)


def test_layers_are_told_in_order_with_their_kv_in_place(llama: LoadedModel) -> None:
    region = HostRegion.allocate(kv_layout(llama, BLOCK_TOKENS, BLOCKS))
    runner, pages = ModelRunner(llama, region), region_tensor(region)
    heard: list[tuple[int, Tensor]] = []
    [sequence] = sequences([random_prompt(10)], [CONTEXT_LENGTH], seed=None)
    runner.forward([sequence.next_row()], lambda layer: heard.append((layer, pages.clone())))
    assert [layer for layer, _ in heard] == list(range(llama.facts.layers))
    for layer, then in heard:
        torch.testing.assert_close(then[layer], pages[layer])
        assert then[layer, :, :2].any(-1).all() and not then[layer + 1 :].any()
    runner.close()
    region.close()


def test_a_step_of_chunks_alone_has_no_logits(llama_runner: ModelRunner) -> None:
    result = llama_runner.forward([Row(RequestId("r"), (3, 4, 5), 0, [BlockId(0)], samples=False)])
    assert result.logits.shape[0] == 0 and result.prompt_logprobs == ((),)


def test_logits_are_those_of_transformers(llama_runner: ModelRunner, directories: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    prompt = random_prompt(30)
    with torch.inference_mode():
        own = AutoModelForCausalLM.from_pretrained(directories["llama"], attn_implementation="eager")
        expected = own(torch.tensor([prompt])).logits[0]
    [sequence] = sequences([prompt], [CONTEXT_LENGTH], seed=0)
    logits = llama_runner.forward([sequence.next_row()]).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], expected[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [CONTEXT_LENGTH, 7, 1])
def test_prompt_logprobs_whatever_the_chunks(
    llama_runner: ModelRunner, directories: dict[str, Path], chunk: int
) -> None:
    from transformers import AutoModelForCausalLM

    prompt = random_prompt(20)
    with torch.inference_mode():
        own = AutoModelForCausalLM.from_pretrained(directories["llama"], attn_implementation="eager")
        expected = own(torch.tensor([prompt])).logits[0].log_softmax(-1)
    positions = []
    blocks = [BlockId(block) for block in range(5)]
    for start in range(0, len(prompt), chunk):
        end = min(start + chunk, len(prompt))
        following = prompt[end] if end < len(prompt) else None
        row = Row(RequestId("r"), prompt[start:end], start, blocks, end == len(prompt), 3, following)
        other = Row(RequestId("s"), (5,), 0, [BlockId(9)], samples=True)
        result = llama_runner.forward([other, row])
        assert result.prompt_logprobs[0] == () and len(result.logits) == 1 + row.samples
        positions.extend(result.prompt_logprobs[1])
    assert len(positions) == len(prompt) - 1
    for index, position in enumerate(positions):
        chosen, *best = position
        assert chosen.token_id == prompt[index + 1]
        assert chosen.logprob == pytest.approx(expected[index, chosen.token_id].item(), abs=1e-4)
        assert [one.token_id for one in best] == expected[index].topk(3).indices.tolist()


def test_half_precision_follows_float32(directories: dict[str, Path]) -> None:
    """bfloat16 takes the block-diagonal way in decode steps; its logits must stay close."""
    prompt = random_prompt(40)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(str(directories["llama"]), device="cpu", dtype=dtype)
        for runner in open_runner(loaded):
            [sequence] = sequences([prompt], [39], seed=0)
            for _ in range(2):
                row = sequence.next_row()
                sequence.computed += len(row.token_ids)
                logits[dtype] = runner.forward([row]).logits
    assert row.samples and len(row.token_ids) == 1
    assert torch.cosine_similarity(logits["float32"], logits["bfloat16"]).item() > 0.99


def test_layout_and_memory(llama: LoadedModel) -> None:
    layout = kv_layout(llama, 16, 10)
    assert layout.shape == (4, 2, 10, 16, 2, 16) and layout.dtype == "float32"
    assert blocks_for_memory(llama, 16, layout.region_bytes) == 10
    assert blocks_for_memory(llama, 16, layout.region_bytes - 1) == 9
