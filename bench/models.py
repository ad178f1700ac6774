"""Makes random Llama models to measure with: `python -m bench.models DIR`.

The directory is an ordinary Hugging Face one (config, safetensors, tokenizer, chat template), so any
server loads it. The weights are random: the text is nonsense, the work is that of a real model.
"""

from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

SPECIAL_TOKENS = ("<unk>", "<bos>", "<eos>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }} {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)
VOCABULARY_MAX = len(SPECIAL_TOKENS) + 65**2 + 65**3


@dataclass(frozen=True, slots=True)
class Shape:
    """The defaults make 28.2 million parameters, 16.4 million of them the embeddings (tied to the head)."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 448
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 32000
    context: int = 8192
    dtype: str = "bfloat16"


def words(count: int) -> list[str]:
    """That many distinct words of two or three syllables."""
    syllables = ["".join(pair) for pair in product("bdfgklmnprstv", "aeiou")]
    made = ("".join(parts) for length in (2, 3) for parts in product(syllables, repeat=length))
    return list(islice(made, count))


def make_tokenizer(shape: Shape) -> Any:
    """One word is one token, and every id below `shape.vocabulary` has its word."""
    vocabulary = [*SPECIAL_TOKENS, *words(shape.vocabulary - len(SPECIAL_TOKENS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast  # whose constructor is not typed
    return fast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=shape.context,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(directory: Path, shape: Shape, seed: int = 0) -> int:
    """Saves the model there and returns its number of parameters; the same seed gives the same weights."""
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
    )
    torch.manual_seed(seed)
    transformers_logging.disable_progress_bar()  # it takes no time
    model = LlamaForCausalLM(config).to(getattr(torch, shape.dtype))
    model.save_pretrained(directory)
    make_tokenizer(shape).save_pretrained(directory)
    return int(model.num_parameters())


def main(
    directory: Annotated[Path, typer.Argument(help="Where the model goes; made if it is missing")],
    layers: Annotated[int, typer.Option(min=1)] = Shape().layers,
    hidden: Annotated[int, typer.Option(min=1)] = Shape().hidden,
    intermediate: Annotated[int, typer.Option(min=1, help="Width of the MLP")] = Shape().intermediate,
    heads: Annotated[int, typer.Option(min=1)] = Shape().heads,
    kv_heads: Annotated[int, typer.Option(min=1)] = Shape().kv_heads,
    vocabulary: Annotated[int, typer.Option(min=8, max=VOCABULARY_MAX)] = Shape().vocabulary,
    context: Annotated[int, typer.Option(min=16, help="Longest prompt plus completion")] = Shape().context,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = Shape().dtype,
    seed: int = 0,
) -> None:
    """Makes a random Llama model with a tokenizer, as an ordinary Hugging Face directory."""
    if dtype not in ("float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"{dtype!r} is not float32, float16 or bfloat16")
    if hidden % heads or heads % kv_heads:
        raise typer.BadParameter("--heads must divide --hidden, and --kv-heads must divide --heads")
    shape = Shape(layers, hidden, intermediate, heads, kv_heads, vocabulary, context, dtype)
    typer.echo(f"{directory}: {make_model(directory, shape, seed) / 1e6:.1f} million parameters")


if __name__ == "__main__":
    typer.run(main)
