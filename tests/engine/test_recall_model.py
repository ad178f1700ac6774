"""The recall model's claim: every answer right, at every length, in both dtypes, and wrong with a wrong block."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.errors import SettingsError
from baton.ids import BlockId, RequestId
from baton.settings import RECALL_MODEL
from engine.batch import Row
from engine.model.loader import load_model
from engine.recall.model import build_recall_model, recall_model_directory
from engine.recall.text import LOCKERS, NAMES, NOBODY, VOCABULARY, Ledger, make_ledger, prompt, question
from engine.runner import ModelRunner, kv_layout
from kvtransfer.region import HostRegion

BLOCK_TOKENS, BLOCKS = 32, 260
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recall")
    build_recall_model(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def runner(directory: Path, dtype: str) -> Iterator[ModelRunner]:
    yield from open_runner(directory, dtype)


def open_runner(directory: Path, dtype: str) -> Iterator[ModelRunner]:
    loaded = load_model(str(directory), device="cpu", dtype=dtype)
    region = HostRegion.allocate(kv_layout(loaded, BLOCK_TOKENS, BLOCKS))
    runner = ModelRunner(loaded, region)
    yield runner
    runner.close()
    region.close()


def asked(ledger: Ledger) -> list[str]:
    """Eleven lockers spread over the ledger, first and last among them, and one that it does not name."""
    lockers = list(ledger.owners)
    spread = [lockers[index * (len(lockers) - 1) // 10] for index in range(11)]
    return [*spread, next(locker for locker in LOCKERS if locker not in ledger.owners)]


def compute(runner: ModelRunner, tokens: list[int], start: int, blocks: list[BlockId], chunk: int = 512) -> int:
    """Computes tokens[start:] in chunks; the greedy next token."""
    for first in range(start, len(tokens), chunk):
        part = tuple(tokens[first : first + chunk])
        row = Row(RequestId("r"), part, first, blocks, first + len(part) == len(tokens))
        logits = runner.forward([row]).logits
    return int(logits[0].argmax())


def answer(runner: ModelRunner, tokenizer: Any, tokens: list[int], start: int, blocks: list[BlockId]) -> str:
    """The text up to the end of sequence, of a prompt whose first `start` tokens are computed."""
    tokens, begin = list(tokens), len(tokens)
    while len(tokens) < begin + 8:
        token = compute(runner, tokens, start, blocks)
        if token == tokenizer.eos_token_id:
            break
        start = len(tokens)
        tokens.append(token)
    text: str = tokenizer.decode(tokens[begin:])
    return text


@pytest.mark.parametrize("lines", [8, 100, 1000])
def test_every_answer_is_right_through_the_runner(runner: ModelRunner, tokenizer: Any, dtype: str, lines: int) -> None:
    if lines == 1000 and dtype == "float32":
        lines = 500  # as long as bfloat16's takes
    ledger = make_ledger(lines, seed=lines)
    known: list[int] = tokenizer(ledger.text)["input_ids"]
    blocks = [BlockId(block) for block in reversed(range(BLOCKS))]
    compute(runner, known, 0, blocks)
    for locker in asked(ledger):
        tokens = tokenizer(prompt(ledger, locker))["input_ids"]
        assert tokens[: len(known)] == known
        assert answer(runner, tokenizer, tokens, len(known), blocks) == f" {ledger.owner(locker)}.\n"


@pytest.mark.parametrize("lines", [8, 100])
def test_every_answer_is_right_through_transformers(directory: Path, tokenizer: Any, dtype: str, lines: int) -> None:
    ledger = make_ledger(lines, seed=lines)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    for locker in asked(ledger):
        tokens = tokenizer(prompt(ledger, locker), return_tensors="pt")
        output = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        assert tokenizer.decode(output, skip_special_tokens=True) == f" {ledger.owner(locker)}.\n"


def test_a_stale_block_shows(runner: ModelRunner, tokenizer: Any) -> None:
    """The block that holds the answer is exchanged for another ledger's."""
    ledger, other = make_ledger(20, seed=1), make_ledger(20, seed=2)
    blocks, stale = [BlockId(block) for block in range(10)], [BlockId(block) for block in range(20, 30)]
    locker = list(ledger.owners)[10]
    tokens = tokenizer(prompt(ledger, locker))["input_ids"]
    compute(runner, tokenizer(other.text)["input_ids"], 0, stale)
    compute(runner, tokens[:-1], 0, blocks)
    right = answer(runner, tokenizer, tokens, len(tokens) - 1, blocks)
    at = (1 + 8 * 10 + 5) // BLOCK_TOKENS
    blocks[at] = stale[at]
    assert right == f" {ledger.owner(locker)}.\n" != answer(runner, tokenizer, tokens, len(tokens) - 1, blocks)


def test_extra_layers_and_width_change_no_answer(tokenizer: Any, tmp_path: Path) -> None:
    build_recall_model(tmp_path, extra_layers=3, hidden_size=1024, intermediate_size=256)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 5
    ledger = make_ledger(30, seed=5)
    blocks = [BlockId(block) for block in range(20)]
    for runner in open_runner(tmp_path, "bfloat16"):
        for locker in asked(ledger)[-3:]:
            tokens = tokenizer(prompt(ledger, locker))["input_ids"]
            assert answer(runner, tokenizer, tokens, 0, blocks) == f" {ledger.owner(locker)}.\n"


# ---- the text


def test_chat_template_makes_the_same_prompt_and_text_round_trips(tokenizer: Any) -> None:
    ledger = make_ledger(5, seed=0)
    locker = next(iter(ledger.owners))
    messages = [{"role": "system", "content": ledger.text}, {"role": "user", "content": question(locker)}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == tokenizer.bos_token + prompt(ledger, locker)
    tokens = tokenizer(prompt(ledger, locker))["input_ids"]
    assert tokens == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens) == rendered


def test_a_conversation_goes_on(runner: ModelRunner, tokenizer: Any) -> None:
    ledger = make_ledger(40, seed=3)
    first, second = list(ledger.owners)[7], list(ledger.owners)[31]
    messages = [
        {"role": "system", "content": ledger.text},
        {"role": "user", "content": question(first)},
        {"role": "assistant", "content": f" {ledger.owner(first)}.\n"},
        {"role": "user", "content": question(second)},
    ]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    blocks = [BlockId(block) for block in range(20)]
    assert answer(runner, tokenizer, tokens, 0, blocks) == f" {ledger.owner(second)}.\n"


def test_ledgers_repeat_by_seed_and_name_a_locker_once() -> None:
    ledger = make_ledger(200, seed=9)
    assert ledger == make_ledger(200, seed=9) != make_ledger(200, seed=10)
    assert len(ledger.owners) == 200 == ledger.text.count("\n")
    assert set(ledger.owners.values()) <= set(NAMES)
    locker, owner = next(iter(ledger.owners.items()))
    assert ledger.text.startswith(f"locker {locker} belongs to {owner}.\n")
    assert ledger.owner("pink-99") == NOBODY


def test_words_are_distinct() -> None:
    assert len(set(NAMES)) == 64 and len(LOCKERS) == 1024 == len(set(LOCKERS))
    assert sorted(VOCABULARY.values()) == list(range(len(VOCABULARY)))


# ---- the cached directory


def test_it_is_built_once_and_loads_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = recall_model_directory()
    assert directory.parent == tmp_path / "baton"
    built = (directory / "model.safetensors").stat().st_mtime_ns
    assert recall_model_directory() == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == built
    assert list(directory.parent.iterdir()) == [directory]
    assert load_model(RECALL_MODEL, device="cpu").facts.vocabulary_size == len(VOCABULARY)


def test_of_two_that_build_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_and_lose(directory: Path) -> None:
        build_recall_model(directory)
        winner = next(iter({recall_model_directory(environment)}))
        assert winner != directory

    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    with monkeypatch.context() as patch:
        calls = iter([build_and_lose, build_recall_model])
        patch.setattr("engine.recall.model.build_recall_model", lambda path: next(calls)(path))
        directory = recall_model_directory(environment)
    assert list((tmp_path / "baton").iterdir()) == [directory]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "baton").write_text("in the way")
    with pytest.raises(SettingsError, match=f"cannot be written to {tmp_path}"):
        recall_model_directory({"XDG_CACHE_HOME": str(tmp_path)})
