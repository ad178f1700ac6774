"""bench.compression: its figures, the codec's speed, and an engine whose prompts go down and come up."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from baton.layout import KVLayout
from bench.compression.__main__ import as_json, codec_table, effect_table, random_questions, recall_questions, sharpen
from bench.compression.asking import BLOCK_TOKENS, Question, measure_effect
from bench.compression.codec_speed import measure_codec, random_rows
from bench.compression.figures import Answer, Effect, difference, kl_nats
from bench.models import Shape, make_model
from engine.model.loader import LoadedModel, load_model
from engine.recall.text import NAMES, NOBODY, VOCABULARY
from kvcache.tiers.interface import StorageFormat
from kvcache.tiers.rows.codec import Int8Codec
from kvcache.tiers.rows.narrow_floats import widened

VOCABULARY_SIZE = 300
SHAPE = Shape(layers=2, hidden=64, intermediate=64, heads=4, kv_heads=2, vocabulary=VOCABULARY_SIZE, dtype="float32")


def answer(tokens: tuple[int, ...], *rows: tuple[float, ...], restored: int = 0) -> Answer:
    return Answer(tokens, np.array(rows, np.float32), restored)


# ---- figures


def test_answers_are_compared_up_to_where_they_part() -> None:
    computed = answer((2, 1, 0), (0, 1, 3), (0, 4, 1), (5, 0, 0))
    restored = answer((2, 0, 0), (0, 1.5, 3), (2, 1, 1), (9, 9, 9))
    found = difference(computed, restored, right=2)
    assert (found.tokens, found.common_tokens, found.is_first_same, found.is_changed) == (3, 1, True, True)
    assert (found.margin, found.logit_difference) == (2.0, 0.5)
    assert (found.was_right, found.is_right) == (True, True)
    first, second = kl_nats(computed.logits[:2], restored.logits[:2])
    assert found.kl_nats == pytest.approx(first) and found.kl_nats_mean == pytest.approx((first + second) / 2)


def test_the_same_answer_differs_in_nothing() -> None:
    one = answer((2, 1), (0, 1, 3), (0, 4, 1))
    found = difference(one, one)
    assert (found.common_tokens, found.is_changed, found.logit_difference, found.kl_nats_mean) == (2, False, 0, 0)
    assert found.was_right is None and found.is_right is None


def test_another_first_token_leaves_one_position_to_compare() -> None:
    computed, restored = answer((2, 1), (0, 1, 3), (0, 4, 1)), answer((1, 1), (0, 4, 3), (7, 7, 8))
    found = difference(computed, restored, right=2)
    assert (found.common_tokens, found.is_first_same, found.was_right, found.is_right) == (0, False, True, False)
    assert found.kl_nats == found.kl_nats_mean > 0


def test_divergence_is_that_of_the_textbook() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    logits = [np.log(each)[None].astype(np.float32) + shift for each, shift in ((p, 3), (q, -8))]
    assert kl_nats(*logits)[0] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


def effect(*common: int, right: int | None = None) -> Effect:
    rows = [(0.0, 1.0, 3.0)] * 2
    pairs = [((2, 2), (2, 2)), ((2, 2), (2, 1)), ((2, 2), (1, 1))]
    chosen = [pairs[2 - each] for each in common]
    return Effect("m", "float32", "int8", [difference(answer(a, *rows), answer(b, *rows), right) for a, b in chosen])


def test_shares_and_means_are_over_the_prompts() -> None:
    told = json.loads(json.dumps(effect(2, 1, 0, 2, right=2).as_json()))
    assert (told["model"], told["storage"], told["prompts"]) == ("m", "int8", 4)
    assert (told["first_token_equal_share"], told["changed_share"]) == (0.75, 0.5)
    assert (told["common_tokens_mean"], told["tokens_mean"], told["first_logit_margin_median"]) == (1.25, 2, 2)
    assert (told["right_computed"], told["right_restored"]) == (4, 3)
    assert effect(2).as_json()["right_restored"] is None


def test_tables_have_a_row_for_each() -> None:
    speed = measure_codec(KVLayout(1, 1, 4, 1, 8, "float32"), blocks=2, repeats=1)
    assert codec_table([speed, speed]).row_count == 2
    assert effect_table([effect(2, 1), effect(0, right=2)]).row_count == 2
    told = json.loads(json.dumps(as_json([speed], [effect(2)], 5)))
    assert (told["seed"], len(told["blocks"]), len(told["effects"])) == (5, 1, 1)


# ---- the codec


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.25), ("bfloat16", 0.5)])
def test_a_block_shrinks_to_what_the_codec_says(dtype: str, share: float) -> None:
    layout = KVLayout(2, 1, 32, 2, 64, dtype)
    speed = measure_codec(layout, blocks=3, repeats=1)
    assert (speed.block_bytes, speed.stored_bytes) == (layout.block_bytes, Int8Codec(layout).stored_bytes)
    assert speed.share == pytest.approx(share, rel=0.02)
    assert speed.encode_gb_per_s > 0 and speed.decode_gb_per_s > 0


def test_the_blocks_hold_normally_distributed_numbers() -> None:
    layout = KVLayout(2, 1, 32, 2, 64, "bfloat16")
    x = widened(random_rows(layout, 4, seed=1), "bfloat16")
    assert abs(float(x.mean())) < 0.02 and float(x.std()) == pytest.approx(1, rel=0.02)


# ---- questions


def test_questions_are_the_same_for_the_same_seed() -> None:
    assert random_questions(3, 70, 1) == random_questions(3, 70, 1) != random_questions(3, 70, 2)
    assert recall_questions(2, 1, lines=4) == recall_questions(2, 1, lines=4) != recall_questions(2, 2, lines=4)


def test_ledgers_are_asked_for_whom_they_name_and_for_nobody() -> None:
    questions = recall_questions(9, 3, lines=4)
    nobody = VOCABULARY[f" {NOBODY}"]
    assert [number for number, question in enumerate(questions) if question.right == nobody] == [0, 8]
    assert {question.right for question in questions[1:8]} <= {VOCABULARY[f" {name}"] for name in NAMES}


# ---- the engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random")
    make_model(directory, SHAPE)
    return directory


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(str(model), device="cpu", dtype="float32")


def prompts(count: int = 5) -> list[Question]:
    generator = torch.Generator().manual_seed(1)
    length = 2 * BLOCK_TOKENS + 5
    return [
        Question(tuple(torch.randint(3, VOCABULARY_SIZE, (length,), generator=generator).tolist()))
        for _ in range(count)
    ]


@pytest.mark.parametrize("storage", ["none", "int8"])
@pytest.mark.usefixtures("patient_restores")
def test_every_prompt_is_computed_and_then_restored(loaded: LoadedModel, storage: StorageFormat) -> None:
    advances = list[int]()
    found = measure_effect(loaded, storage, prompts(), 4, ignore_eos=True, advance=lambda: advances.append(1))
    assert len(advances) == 10 and [each.tokens for each in found] == [4] * 5
    if storage == "none":
        assert not any(each.is_changed or each.logit_difference for each in found)
    else:
        assert all(0 < each.logit_difference < 1 for each in found), "it came from int8, and not far off"


def test_sharper_queries_and_keys_have_larger_effects(model: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    sharpen(model, tmp_path / "sharp", 8.0)
    sharp = load_model(str(tmp_path / "sharp"), device="cpu", dtype="float32")
    assert sharp.facts.fingerprint != loaded.facts.fingerprint
    plain, sharper = (
        measure_effect(each, "int8", prompts(), 1, ignore_eos=True, advance=lambda: None) for each in (loaded, sharp)
    )
    assert sum(each.kl_nats for each in sharper) > 2 * sum(each.kl_nats for each in plain)
