"""The recall model: a Llama with constructed weights that answers questions about its own prompt without fail.

One wrong, stale, missing or misplaced KV block shows as a wrong name, in float32 and in bfloat16, at any
length up to its context. How it works:

- A token's hidden state is its one-hot beside a large constant, which keeps every RMSNorm's scale the same.
- Layer 0: three heads look back 3, 4 and 5 tokens. Their keys are constant and their queries the same
  constant turned by the distance, on the rotary pairs that turn fast; the score, a sum of cosines, peaks
  at that distance alone. Each writes the colour or number it finds into a field of its own.
- The last layer: one head recalls, on the rotary pairs that hardly turn. At the `:` of `assistant:` the
  colour stands 5 back and the number 4 back; at a name in the ledger, 4 and 3 back. Colour, number and
  "is a name" must match for a name to win; `<bos>` offers `nobody` for less than three matches but more
  than two.
- The head votes for the recalled name, and louder for what must follow a name: full stop, newline, end.

Layers between the two are zero: they cost what any layer costs and change nothing. Needs no torch.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from baton.errors import SettingsError
from engine.recall import text as recall_text
from engine.recall.text import BOS, COLOURS, CONTEXT_LENGTH, EOS, NAMES, NOBODY, NUMBERS, PAD, VOCABULARY

Matrix = npt.NDArray[np.float32]

HEAD_DIM = 128
HALF = HEAD_DIM // 2
ROTARY_BASE = 1e12
HIDDEN_SIZE_MIN = 512
FAST_PAIRS = range(20)
SLOW_PAIRS = range(32, 64)
FLAG_PAIR = 31
CONSTANT = 16.0
DISTANCE_NATS = 40.0
"""A fast pair's part of the score at the right distance; one token off, the sum loses 0.8 of this."""
MATCH_NATS = 60.0
NOBODY_MATCHES = 2.5
RECALL_LOGIT, FOLLOW_LOGIT = 54.0, 108.0

_FETCH_DISTANCES = (3, 4, 5)
_FETCHED = [*(f" {colour}" for colour in COLOURS), *NUMBERS]
_RECALLED = [f" {name}" for name in (*NAMES, NOBODY)]
_CONSTANT_AT = len(VOCABULARY)
_FETCHED_AT = {distance: _CONSTANT_AT + 1 + head * len(_FETCHED) for head, distance in enumerate(_FETCH_DISTANCES)}
_RECALLED_AT = _CONSTANT_AT + 1 + len(_FETCH_DISTANCES) * len(_FETCHED)
_NORM_SQUARES = CONSTANT**2 + 1
"""What the squares of a hidden state sum to, but for the few ones that later layers add."""


def recall_model_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """The model as a Hugging Face directory in the user's cache, built on first use.

    Safe to call from many processes at once. Raises SettingsError where the cache cannot be written.
    """
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"
    directory = cache / f"recall-{_version()}"
    if directory.is_dir():
        return directory
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="recall-", dir=cache))
        build_recall_model(temporary)
        temporary.chmod(0o755)
        _publish(temporary, directory)
    except OSError as error:
        raise SettingsError(f"The demo model cannot be written to {cache}: {error.strerror}.") from None
    return directory


def _publish(temporary: Path, directory: Path) -> None:
    """Whoever renames first wins; the others' copies are the same and go."""
    try:
        temporary.rename(directory)
    except OSError:
        shutil.rmtree(temporary)
        if not directory.is_dir():
            raise


def _version() -> str:
    """Changes with the code that builds the model."""
    sources = (Path(__file__), Path(recall_text.__file__))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def build_recall_model(
    directory: Path, *, extra_layers: int = 0, hidden_size: int = HIDDEN_SIZE_MIN, intermediate_size: int = 64
) -> None:
    """Writes configuration, float32 weights and tokenizer; `hidden_size` is a multiple of 128 from 512 up."""
    assert hidden_size >= HIDDEN_SIZE_MIN and hidden_size % HEAD_DIM == 0
    layers = 2 + extra_layers
    directory.mkdir(parents=True, exist_ok=True)
    recall_text.build_tokenizer().save_pretrained(directory)
    _write_json(directory / "config.json", _config(layers, hidden_size, intermediate_size))
    special = {"bos_token_id": VOCABULARY[BOS], "eos_token_id": VOCABULARY[EOS], "pad_token_id": VOCABULARY[PAD]}
    _write_json(directory / "generation_config.json", special)
    weights = build_weights(layers, hidden_size, intermediate_size)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(layers: int, hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    heads = hidden_size // HEAD_DIM
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(VOCABULARY),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROTARY_BASE,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": VOCABULARY[BOS],
        "eos_token_id": VOCABULARY[EOS],
        "pad_token_id": VOCABULARY[PAD],
    }


def build_weights(layers: int, hidden_size: int, intermediate_size: int) -> dict[str, Matrix]:
    """By transformers' names, each [outputs, inputs]."""
    norm = np.full(hidden_size, np.sqrt(_NORM_SQUARES / hidden_size), np.float32)
    weights = {
        "model.embed_tokens.weight": _embedding(hidden_size),
        "model.norm.weight": norm,
        "lm_head.weight": _head(hidden_size),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        weights |= {f"{prefix}{name}.weight": norm for name in ("input_layernorm", "post_attention_layernorm")}
        for name, shape in {"gate": (intermediate_size, hidden_size), "up": (intermediate_size, hidden_size)}.items():
            weights[f"{prefix}mlp.{name}_proj.weight"] = np.zeros(shape, np.float32)
        weights[f"{prefix}mlp.down_proj.weight"] = np.zeros((hidden_size, intermediate_size), np.float32)
        attention = _Attention(hidden_size)
        if layer == 0:
            for head, distance in enumerate(_FETCH_DISTANCES):
                _fetch(attention, head, distance)
        elif layer == layers - 1:
            _recall(attention)
        weights |= {f"{prefix}self_attn.{name}_proj.weight": matrix for name, matrix in attention.matrices.items()}
    return weights


class _Attention:
    """One layer's projections, all zero at first."""

    def __init__(self, hidden_size: int) -> None:
        self.matrices = {name: np.zeros((hidden_size, hidden_size), np.float32) for name in "qkvo"}

    def head(self, name: str, head: int) -> Matrix:
        """The part of q, k or v that makes one head's vector: [HEAD_DIM, hidden_size], writable."""
        return self.matrices[name][head * HEAD_DIM : (head + 1) * HEAD_DIM]

    def copy(self, head: int, words: list[str], target: int) -> None:
        """The head's values are the words' one-hots, and its output adds them to the hidden state at `target`."""
        for index, word in enumerate(words):
            self.head("v", head)[index, VOCABULARY[word]] = 1
            self.matrices["o"][target + index, head * HEAD_DIM + index] = 1


def _fetch(attention: _Attention, head: int, distance: int) -> None:
    """Attends to the token `distance` back and writes down which colour or number it is."""
    amplitude = np.sqrt(DISTANCE_NATS * np.sqrt(HEAD_DIM)) / CONSTANT
    query, key = attention.head("q", head), attention.head("k", head)
    for pair in FAST_PAIRS:
        angle = distance * ROTARY_BASE ** (-pair / HALF)
        key[pair, _CONSTANT_AT] = amplitude
        query[pair, _CONSTANT_AT] = amplitude * np.cos(angle)
        query[pair + HALF, _CONSTANT_AT] = -amplitude * np.sin(angle)
    attention.copy(head, _FETCHED, _FETCHED_AT[distance])


def _recall(attention: _Attention) -> None:
    """Attends to the name whose locker is the one asked for, or to `<bos>`, and writes down the name."""
    amplitude = np.sqrt(MATCH_NATS * np.sqrt(HEAD_DIM))
    query, key = attention.head("q", 0), attention.head("k", 0)
    for index in range(len(COLOURS)):
        pair, number = SLOW_PAIRS[index], len(COLOURS) + index
        query[pair, _FETCHED_AT[5] + index] = key[pair, _FETCHED_AT[4] + index] = amplitude
        query[pair + HALF, _FETCHED_AT[4] + number] = key[pair + HALF, _FETCHED_AT[3] + number] = amplitude
    query[FLAG_PAIR, _CONSTANT_AT] = amplitude / CONSTANT
    for name in NAMES:
        key[FLAG_PAIR, VOCABULARY[f" {name}"]] = amplitude
    key[FLAG_PAIR, VOCABULARY[BOS]] = amplitude * NOBODY_MATCHES
    attention.copy(0, _RECALLED, _RECALLED_AT)
    attention.head("v", 0)[_RECALLED.index(f" {NOBODY}"), VOCABULARY[BOS]] = 1


def _embedding(hidden_size: int) -> Matrix:
    embedding = np.zeros((len(VOCABULARY), hidden_size), np.float32)
    np.fill_diagonal(embedding, 1)
    embedding[:, _CONSTANT_AT] = CONSTANT
    return embedding


def _head(hidden_size: int) -> Matrix:
    head = np.zeros((len(VOCABULARY), hidden_size), np.float32)
    for index, word in enumerate(_RECALLED):
        head[VOCABULARY[word], _RECALLED_AT + index] = RECALL_LOGIT
        head[VOCABULARY["."], VOCABULARY[word]] = FOLLOW_LOGIT
    head[VOCABULARY["\n"], VOCABULARY["."]] = FOLLOW_LOGIT
    head[VOCABULARY[EOS], VOCABULARY["\n"]] = FOLLOW_LOGIT
    return head
