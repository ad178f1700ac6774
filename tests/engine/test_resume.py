"""A sequence that another engine began goes on with just the tokens that it would have had there."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_driver import EngineDriver
from tiny_models import make_model, random_prompt

from baton.errors import InvalidRequest
from baton.ids import RequestId
from baton.settings import WorkerSettings
from engine.interface import FinishReason
from engine.model.loader import LoadedModel, load_model
from engine.opening import open_engine

BLOCK_TOKENS = 8
NEW_TOKENS = 20
PROMPT = random_prompt(21, seed=3)
CUTS = (1, 2, 3, 4, 11, 12, 19)
"""Tokens that came before the first engine was lost; 3 and 11 end a block."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 11},
    "filtered": {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "seed": 12},
    "repetition": {"repetition_penalty": 1.5},
    "presence and frequency": {"temperature": 0.8, "presence_penalty": 1.5, "frequency_penalty": 0.7, "seed": 13},
    "bias": {"temperature": 1.0, "seed": 14, "logit_bias": {5: 4.0, 9: -100.0}},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 1},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(str(make_model("llama", tmp_path_factory.mktemp("resume"))), device="cpu", dtype="float32")


@pytest.fixture
def engines(loaded: LoadedModel) -> Iterator[tuple[EngineDriver, EngineDriver]]:
    """One that serves a request undisturbed, and one that takes over."""
    settings = WorkerSettings(kv_blocks=64, block_tokens=BLOCK_TOKENS, chunk_tokens=16)
    drivers = EngineDriver(open_engine(loaded, settings)), EngineDriver(open_engine(loaded, settings))
    yield drivers
    for driver in drivers:
        driver.assert_idle()
        driver.engine.close()


def run(driver: EngineDriver, name: str, generated: tuple[int, ...] = (), **sampling: Any) -> list[int]:
    request_id = driver.add(name, PROMPT, generated=generated, **{"max_tokens": NEW_TOKENS} | sampling)
    driver.run()
    assert not driver.failed
    return driver.outputs[request_id]


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_on_token_by_token(way: str, engines: tuple[EngineDriver, EngineDriver]) -> None:
    first, second = engines
    undisturbed = run(first, "whole", **WAYS[way])
    assert len(undisturbed) == NEW_TOKENS
    for cut in CUTS:
        rest = run(second, f"cut at {cut}", tuple(undisturbed[:cut]), **WAYS[way])
        assert undisturbed[:cut] + rest == undisturbed, f"cut at {cut}"
        assert second.reason(RequestId(f"cut at {cut}")) is FinishReason.LENGTH


def test_penalties_count_what_came_before(engines: tuple[EngineDriver, EngineDriver]) -> None:
    """Else the test above could not fail for them."""
    first, second = engines
    plain = run(first, "plain")
    penalized = run(first, "penalized", **WAYS["repetition"])
    assert plain != penalized
    as_prompt = second.add("as prompt", (*PROMPT, *penalized[:4]), max_tokens=16, frequency_penalty=2.0)
    second.run()
    continued = run(second, "continued", tuple(penalized[:4]), frequency_penalty=2.0)
    assert second.outputs[as_prompt] != continued


def test_min_tokens_and_stop_tokens_go_on_counting(engines: tuple[EngineDriver, EngineDriver]) -> None:
    first, second = engines
    unstopped = run(first, "unstopped")
    sampling = {"stop_token_ids": (unstopped[4],), "min_tokens": 8}
    undisturbed = run(first, "stopped", **sampling)
    for cut in range(1, min(8, len(undisturbed))):
        rest = run(second, f"cut at {cut}", tuple(undisturbed[:cut]), **sampling)
        assert undisturbed[:cut] + rest == undisturbed
        assert second.reason(RequestId(f"cut at {cut}")) == first.reason(RequestId("stopped"))


def test_logprobs_are_those_of_the_new_tokens_and_the_prompts_are_not_told_again(
    engines: tuple[EngineDriver, EngineDriver],
) -> None:
    first, second = engines
    sampling: dict[str, Any] = {"logprobs": 2, "prompt_logprobs": 1}
    undisturbed = run(first, "whole", **sampling)
    assert first.first[RequestId("whole")].prompt_logprobs
    run(second, "rest", tuple(undisturbed[:5]), **sampling)
    begun = second.first[RequestId("rest")]
    assert begun.prompt_logprobs == ()
    assert begun.logprobs[0][0].token_id == undisturbed[5]


def test_what_was_generated_is_found_in_the_prefix_cache(engines: tuple[EngineDriver, EngineDriver]) -> None:
    _, second = engines
    undisturbed = run(second, "whole")
    rest = run(second, "rest", tuple(undisturbed[:15]))
    assert undisturbed[:15] + rest == undisturbed
    known = (len(PROMPT) + 15 - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert second.admitted[RequestId("rest")].cached_tokens == known > len(PROMPT)


@pytest.mark.parametrize(
    ("generated", "sampling"), [((5,) * NEW_TOKENS, {}), ((5, 6), {"stop_token_ids": (6,)}), ((10**6,), {})]
)
def test_what_cannot_go_on_is_refused(
    generated: tuple[int, ...], sampling: dict[str, Any], engines: tuple[EngineDriver, EngineDriver]
) -> None:
    _, second = engines
    with pytest.raises(InvalidRequest) as error:
        second.add("refused", PROMPT, generated=generated, **{"max_tokens": NEW_TOKENS} | sampling)
    assert error.value.param == "generated"
