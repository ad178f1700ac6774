"""Token for token what transformers generates, on every path that a request can take through engines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver
from tiny_models import FAMILIES, make_model, random_prompt, reference

from baton.ids import RequestId
from baton.settings import WorkerSettings
from engine.interface import Prefill
from engine.model.loader import LoadedModel, load_model
from engine.opening import open_engine

BLOCK_TOKENS = 8
NEW_TOKENS = 10
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 23, 31, 33, 40, 48, 57, 64, 90)
"""Around block boundaries, and on both sides of the sliding window."""
PROMPTS = [random_prompt(length, seed=length) for length in LENGTHS]
GROWING = [PROMPTS[index] for index in (10, 9, 6, 4)]
CRAMPED_BLOCKS = 14
"""Enough for these prompts at first, which take 12 and a margin, but not in the end, when they take 18."""
SEEDED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1, "seed": 4711}

Prompt = tuple[int, ...]
Drive = Callable[..., EngineDriver]


@dataclass
class Family:
    directory: Path
    loaded: LoadedModel
    references: dict[Prompt, list[int]] = field(default_factory=dict)

    def expected(self, prompt: Prompt) -> list[int]:
        if prompt not in self.references:
            self.references[prompt] = reference(self.directory, prompt, NEW_TOKENS)
        return self.references[prompt]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    torch.set_num_threads(1)
    directory = make_model(request.param, tmp_path_factory.mktemp(request.param))
    return Family(directory, load_model(str(directory), device="cpu", dtype="float32"))


@pytest.fixture
def drive(family: Family) -> Iterator[Drive]:
    """Makes engines over the family's model; at the end nobody may hold a block of any of them."""
    drivers: list[EngineDriver] = []

    def make(**settings: Any) -> EngineDriver:
        settings = {"kv_blocks": 512, "block_tokens": BLOCK_TOKENS, "chunk_tokens": 64} | settings
        drivers.append(EngineDriver(open_engine(family.loaded, WorkerSettings(**settings))))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.assert_idle()
        driver.engine.close()


def generate(driver: EngineDriver, prompts: list[Prompt], **sampling: Any) -> list[list[int]]:
    """All at once, under new ids; the outputs in order."""
    first = len(driver.outputs)
    sampling = {"max_tokens": NEW_TOKENS} | sampling
    ids = [driver.add(f"{first + number}", prompt, **sampling) for number, prompt in enumerate(prompts)]
    driver.run()
    assert not driver.failed
    return [driver.outputs[request_id] for request_id in ids]


def test_alone(family: Family, drive: Drive) -> None:
    driver = drive()
    for prompt in (PROMPTS[0], PROMPTS[8], PROMPTS[15]):
        assert generate(driver, [prompt]) == [family.expected(prompt)]


def test_in_a_batch_of_mixed_lengths_with_a_cold_and_a_warm_cache(family: Family, drive: Drive) -> None:
    driver = drive()
    expected = [family.expected(prompt) for prompt in PROMPTS]
    assert generate(driver, PROMPTS) == expected
    assert driver.engine.stats().prefix_hits_tokens == 0
    assert generate(driver, PROMPTS) == expected
    assert driver.engine.stats().prefix_hits_tokens == sum(
        (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS for length in LENGTHS
    )


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
def test_in_chunks(family: Family, drive: Drive, chunk_tokens: int) -> None:
    prompts = [PROMPTS[4], PROMPTS[13], PROMPTS[10]]
    assert generate(drive(chunk_tokens=chunk_tokens), prompts) == [family.expected(prompt) for prompt in prompts]


def test_after_preemption(family: Family, drive: Drive) -> None:
    driver = drive(kv_blocks=CRAMPED_BLOCKS)
    prompts = GROWING
    assert generate(driver, prompts) == [family.expected(prompt) for prompt in prompts]
    assert driver.engine.stats().preemptions > 0


def test_prefilled_elsewhere(family: Family, drive: Drive) -> None:
    prefill, decode = drive(chunk_tokens=16), drive()
    for prompt in (PROMPTS[0], PROMPTS[6], PROMPTS[15]):
        assert disaggregated(prefill, decode, prompt) == family.expected(prompt)


def test_prefilled_elsewhere_onto_a_cached_prefix(family: Family, drive: Drive) -> None:
    prefill, decode = drive(), drive()
    prompt = PROMPTS[15]
    generate(decode, [prompt[:50]])
    assert disaggregated(prefill, decode, prompt) == family.expected(prompt)
    assert decode.ended[RequestId("apart-1")].cached_tokens == 48


def disaggregated(prefill: EngineDriver, decode: EngineDriver, prompt: Prompt, **sampling: Any) -> list[int]:
    name = f"apart-{len(decode.outputs)}"
    sampling = {"max_tokens": NEW_TOKENS} | sampling
    request_id = decode.add(name, prompt, Prefill.ELSEWHERE, **sampling)
    decode.step()
    prefill.add(name, prompt, Prefill.ONLY, **sampling)
    prefill.run()
    lacking = decode.admitted[request_id].cached_tokens // BLOCK_TOKENS
    copy_blocks(prefill, decode, request_id, lacking)
    prefill.engine.release(request_id)
    decode.engine.commit(request_id, prefill.outputs[request_id][0], prefill.ended[request_id].logprobs)
    decode.run()
    return decode.outputs[request_id]


def copy_blocks(source: EngineDriver, target: EngineDriver, request_id: RequestId, first: int) -> None:
    """What a transport does: each layer's key and value slices of the prompt's blocks from `first` on."""
    pairs = zip(source.admitted[request_id].blocks, target.admitted[request_id].blocks, strict=True)
    for there, here in list(pairs)[first:]:
        for layer in range(source.engine.model.layout.layers):
            for kv in (0, 1):
                bytes_there = source.engine.region.readable(layer, kv, there, 1)
                place = target.engine.region.writable(layer, kv, here, 1)
                place[:] = bytes_there
                target.engine.region.written(layer, kv, here, 1, place)


def test_seeded_sampling_is_the_same_on_every_path(drive: Drive) -> None:
    prompts = GROWING
    driver = drive()
    expected = [generate(driver, [prompt], **SEEDED)[0] for prompt in prompts]
    assert len({tuple(output) for output in expected}) == len(prompts)
    assert generate(driver, prompts, **SEEDED) == expected, "in a batch, with a warm cache"
    assert generate(drive(chunk_tokens=7), prompts, **SEEDED) == expected, "in chunks"
    cramped = drive(kv_blocks=CRAMPED_BLOCKS)
    assert generate(cramped, prompts, **SEEDED) == expected, "after preemption"
    assert cramped.engine.stats().preemptions > 0
    prefill, decode = drive(), drive()
    assert [disaggregated(prefill, decode, prompt, **SEEDED) for prompt in prompts] == expected, "apart"
    assert generate(driver, prompts, **SEEDED | {"seed": 1}) != expected
