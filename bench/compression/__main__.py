"""`python -m bench.compression [--json]`: what `kv_compression: int8` costs and gives.

Bytes of a block and the codec's speed; then, through a real engine and its DDR tier, what becomes of greedy answers
when the prompt's KV was restored instead of computed: from int8 and, as the control, from KV stored as it is. Three
models are asked. `random` has random weights: its logits are nearly flat, so that little changes its tokens, but so is
its attention, which averages errors out. `sharp` is the same with queries and keys SHARPER times as large: attention
picks tokens, as that of trained models does, and errors count. `recall` knows right answers from wrong ones, and by a
large margin. What int8 does to a trained model's answers, only that model tells.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file

from baton.layout import KVLayout
from baton.settings import RECALL_MODEL
from bench.compression.asking import BLOCK_TOKENS, NotRestored, Question, measure_effect
from bench.compression.codec_speed import CodecSpeed, measure_codec
from bench.compression.figures import Effect
from bench.load import FIRST_TOKEN_ID
from bench.models import Shape, make_model
from bench.wide import wide_console
from engine.model.loader import load_model
from engine.recall.text import LOCKERS, VOCABULARY, build_tokenizer, make_ledger, prompt
from kvcache.tiers.interface import StorageFormat

DTYPES = ("float32", "bfloat16")
STORAGES: tuple[StorageFormat, ...] = ("none", "int8")
SHAPE = Shape(context=8448)
ANSWER_TOKENS = 64
SHARPER = 4.0
WEIGHTS = "model.safetensors"
LEDGER_LINES = 100
UNKNOWN_EVERY = 8
"""One question in so many is about a locker that its ledger does not name."""


@dataclass(frozen=True, slots=True)
class Task:
    """Questions to one model."""

    name: str
    model: str
    questions: Sequence[Question]
    ignore_eos: bool


def random_questions(prompts: int, tokens: int, seed: int) -> list[Question]:
    chance = random.Random(seed)
    ids = range(FIRST_TOKEN_ID, SHAPE.vocabulary)
    return [Question(tuple(chance.choices(ids, k=tokens))) for _ in range(prompts)]


def recall_questions(prompts: int, seed: int, lines: int = LEDGER_LINES) -> list[Question]:
    """Each about a ledger of its own."""
    chance, tokenizer = random.Random(seed), build_tokenizer()
    questions = []
    for number in range(prompts):
        ledger = make_ledger(lines, seed * 10**6 + number)
        unknown = [locker for locker in LOCKERS if locker not in ledger.owners]
        locker = chance.choice(unknown if number % UNKNOWN_EVERY == 0 else list(ledger.owners))
        ids = tokenizer.encode(prompt(ledger, locker))
        questions.append(Question(tuple(ids), VOCABULARY[f" {ledger.owner(locker)}"]))
    return questions


def sharpen(model: Path, target: Path, factor: float) -> None:
    """A copy of a model whose queries and keys are so many times as large."""
    shutil.copytree(model, target)
    weights = load_file(target / WEIGHTS)
    for name, tensor in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor *= factor
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})


def effects(tasks: Sequence[Task], advance: Callable[[], None]) -> Iterator[Effect]:
    for task in tasks:
        for dtype in DTYPES:
            loaded = load_model(task.model, device="cpu", dtype=dtype)
            for storage in STORAGES:
                differences = measure_effect(
                    loaded, storage, task.questions, ANSWER_TOKENS, ignore_eos=task.ignore_eos, advance=advance
                )
                yield Effect(task.name, dtype, storage, differences)


def run(prompts: int, tokens: int, seed: int, console: Console) -> tuple[list[CodecSpeed], list[Effect]]:
    """Raises NotRestored."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    head_dim = SHAPE.hidden // SHAPE.heads
    with tempfile.TemporaryDirectory(prefix="baton-") as made, Progress(*columns, console=console) as progress:
        make_model(model := Path(made) / "random", SHAPE, seed)
        sharpen(model, sharp := Path(made) / "sharp", SHARPER)
        questions = random_questions(prompts, tokens, seed)
        tasks = [
            Task("random", str(model), questions, ignore_eos=True),
            Task("sharp", str(sharp), questions, ignore_eos=True),
            Task("recall", RECALL_MODEL, recall_questions(prompts, seed), ignore_eos=False),
        ]
        speeds = [
            measure_codec(KVLayout(SHAPE.layers, 1, BLOCK_TOKENS, SHAPE.kv_heads, head_dim, dtype)) for dtype in DTYPES
        ]
        answers = 2 * sum(len(task.questions) for task in tasks) * len(DTYPES) * len(STORAGES)
        advance = partial(progress.advance, progress.add_task("answers", total=answers))
        return speeds, list(effects(tasks, advance))


def codec_table(speeds: Sequence[CodecSpeed]) -> Table:
    title = f"a block of {BLOCK_TOKENS} tokens of the random model, as int8"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("dtype", "bytes", "stored", "of it", "encoded, GB/s", "decoded, GB/s"):
        made.add_column(heading, justify="left" if heading == "dtype" else "right")
    for speed in speeds:
        sizes = (f"{speed.block_bytes:,}", f"{speed.stored_bytes:,}", f"{speed.share:.3f}")
        made.add_row(speed.dtype, *sizes, f"{speed.encode_gb_per_s:.2f}", f"{speed.decode_gb_per_s:.2f}")
    return made


def effect_table(found: Sequence[Effect]) -> Table:
    made = Table(title="answers from restored KV, against computed", title_justify="left", box=box.SIMPLE_HEAD)
    headings = ("first same", "same tokens", "changed", "margin", "logits", "KL, first", "KL, all", "right")
    for heading in ("model", "dtype", "kept as", *headings):
        made.add_column(heading, justify="right" if heading in headings else "left", no_wrap=True)
    for effect in found:
        right = "–" if effect.is_right is None else f"{effect.is_right} of {len(effect.differences)}"
        made.add_row(
            effect.model,
            effect.dtype,
            effect.storage,
            f"{effect.share(lambda each: each.is_first_same):.0%}",
            f"{effect.mean(lambda each: each.common_tokens):.1f} of {effect.mean(lambda each: each.tokens):.1f}",
            f"{effect.share(lambda each: each.is_changed):.0%}",
            f"{effect.margin:.3g}",
            f"{effect.largest(lambda each: each.logit_difference):.2g}",
            f"{effect.mean(lambda each: each.kl_nats):.1e}",
            f"{effect.mean(lambda each: each.kl_nats_mean):.1e}",
            right,
        )
    return made


def as_json(speeds: Sequence[CodecSpeed], found: Sequence[Effect], seed: int) -> dict[str, Any]:
    blocks = [{**asdict(speed), "stored_share": speed.share} for speed in speeds]
    return {"seed": seed, "blocks": blocks, "effects": [effect.as_json() for effect in found]}


def main(
    prompts: Annotated[int, typer.Option(min=1, help="For each model")] = 32,
    tokens: Annotated[int, typer.Option(min=64, max=8192, help="In each of the random model's prompts")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the model, the prompts and the ledgers")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="torch threads")] = 1,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
) -> None:
    """Measures what keeping KV in int8 below HBM saves, and what it does to the answers."""
    torch.set_num_threads(threads)
    console = Console(stderr=True)
    try:
        speeds, found = run(prompts, tokens, seed, console)
    except NotRestored as error:
        console.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    if is_json:
        typer.echo(json.dumps(as_json(speeds, found, seed), indent=2))
        return
    for table in (codec_table(speeds), effect_table(found)):
        wide_console().print(table)
    wide_console().print(
        "margin: median lead of the best logit over the next; logits: their largest difference; KL: means, in nats."
    )


if __name__ == "__main__":
    typer.run(main)
