from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import Typer
from typer.testing import CliRunner

from bench import models
from bench.models import Shape, make_model, words

TINY = Shape(layers=2, hidden=16, intermediate=24, heads=4, kv_heads=2, vocabulary=300, context=64)


def test_the_directory_loads_as_any_other(tmp_path: Path) -> None:
    parameters = make_model(tmp_path, TINY)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == parameters
    assert (model.config.num_key_value_heads, model.config.vocab_size) == (2, 300)


def test_every_id_has_its_word_and_text_comes_back(tmp_path: Path) -> None:
    make_model(tmp_path, TINY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 300
    ids = list(range(3, 300))
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "baba"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<bos> user baba assistant"


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model(tmp_path / name, TINY, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_words_are_distinct() -> None:
    assert len(set(words(32000))) == 32000


def test_a_shape_that_cannot_be_is_refused(tmp_path: Path) -> None:
    app = Typer()
    app.command()(models.main)
    for arguments in (["--heads", "7"], ["--dtype", "int8"], ["--vocabulary", "2"]):
        assert CliRunner().invoke(app, [str(tmp_path / "m"), *arguments]).exit_code == 2
    assert not (tmp_path / "m").exists()
