import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequest
from baton.layout import KVLayout
from baton.rpc.convert import layout_from_proto, layout_to_proto, sampling_from_proto, sampling_to_proto
from baton.sampling import LOGIT_BIAS_MAX, STOP_TOKEN_IDS_MAX, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("stop_token_ids", tuple(range(STOP_TOKEN_IDS_MAX + 1))),
        ("logit_bias", dict.fromkeys(range(LOGIT_BIAS_MAX + 1), 1.0)),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"at most max_tokens \(2\)"):
        SamplingParams(min_tokens=3, max_tokens=2)


def test_top_k_of_minus_one_means_all_tokens() -> None:
    assert SamplingParams(top_k=-1).top_k == 0


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0).is_greedy and not SamplingParams(temperature=0.1).is_greedy


@pytest.mark.parametrize("changes", [{"logit_bias": {10: 1.0}}, {"stop_token_ids": (10,)}, {"logit_bias": {-1: 1.0}}])
def test_ids_outside_the_vocabulary_are_refused(changes: dict[str, Any]) -> None:
    params = SamplingParams(**changes)
    params.with_changes(logit_bias={9: 1.0}, stop_token_ids=(0,)).check_vocabulary(10)
    with pytest.raises(InvalidRequest, match="from 0 to 9"):
        params.check_vocabulary(10)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31 - 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100), max_size=4),
    seed=optional(st.integers(0, 2**64 - 1)),
    max_tokens=optional(st.integers(8, 2**32 - 1)),
    min_tokens=st.integers(0, 8),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=optional(st.integers(0, 20)),
    prompt_logprobs=optional(st.integers(0, 20)),
)


@given(SAMPLING)
def test_parameters_survive_the_wire(params: SamplingParams) -> None:
    assert sampling_from_proto(sampling_to_proto(params)) == params


@given(st.builds(KVLayout, *[st.integers(1, 2**16)] * 5, st.sampled_from(["float32", "bfloat16"])))
def test_a_layout_survives_the_wire(layout: KVLayout) -> None:
    assert layout_from_proto(layout_to_proto(layout)) == layout
