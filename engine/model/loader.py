"""Loads a model from Hugging Face files, and refuses, with the reason, what would not be served right."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers import logging as transformers_logging

from baton.errors import SettingsError, UnsupportedModel
from baton.layout import DTYPE_BYTES
from engine.attention.paged import PAGED_ATTENTION, register_paged_attention
from engine.model.fingerprint import fingerprint
from engine.model.packed_linear import can_pack, pack_linears
from engine.model.source import find_model
from engine.model.support import PROBE_ATTENTION, check_class, check_config, probe, register_probe_attention

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError, SafetensorError)
"""What transformers raises for files that it cannot make a model of."""
_CONTEXT_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's files say about it."""

    layers: int
    kv_heads: int
    head_dim: int
    context_length: int
    vocabulary_size: int
    """How many logits each position has."""
    eos_token_ids: frozenset[int]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Any
    """The transformers model, in evaluation mode, attending through PAGED_ATTENTION."""
    facts: ModelFacts
    device: torch.device
    dtype: torch.dtype
    keeps_logits: bool
    """Whether its forward can leave out the logits that nobody wants."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def logits_at(self, token_ids: Tensor, position_ids: Tensor, wanted: Tensor, **step: Any) -> Tensor:
        """[wanted, vocabulary] of one packed sequence [1, tokens]."""
        keep = {"logits_to_keep": wanted} if self.keeps_logits else {}
        output = self.model(input_ids=token_ids, position_ids=position_ids, use_cache=False, **keep, **step)
        logits: Tensor = output.logits[0]
        return logits if self.keeps_logits else logits[wanted]


def load_model(name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> LoadedModel:
    """Loads a directory, a hub id or the bundled demo model.

    Raises SettingsError for a model or device that is not there, UnsupportedModel for one that cannot be served.
    """
    directory, target = find_model(name), choose_device(device)
    config = _load_config(directory, trust_remote_code)
    check_config(config)
    if model_class := MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None):
        check_class(config.model_type, model_class)
    chosen = choose_dtype(config, dtype)
    model = _load_weights(directory, config, chosen, trust_remote_code)
    check_class(config.model_type, type(model))
    model = model.eval().requires_grad_(False).to(target)
    if can_pack(target, chosen):
        pack_linears(model)
    shape, vocabulary_size = probe(model)
    model.set_attn_implementation(PAGED_ATTENTION)
    facts = ModelFacts(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        context_length=context_length(config),
        vocabulary_size=vocabulary_size,
        eos_token_ids=frozenset(_eos_token_ids(directory, config, model.generation_config)),
        fingerprint=fingerprint(directory, config.to_dict(), str(chosen)),
    )
    keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    return LoadedModel(model, facts, target, chosen, keeps_logits)


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises SettingsError when it is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise SettingsError(f"The device must be auto, cpu, cuda or cuda:N, not {name}.")
    if int(index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"The device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices.")
    return torch.device("cuda", int(index or 0))


def choose_dtype(config: Any, dtype: str) -> torch.dtype:
    """`auto` is the checkpoint's own, or float32 where it names none."""
    if dtype == "auto":
        own = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
        dtype = str(own).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModel(f"The dtype {dtype} is not served; choose one of {', '.join(DTYPE_BYTES)}.")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def context_length(config: Any) -> int:
    """The longest sequence whose every prefix has the same KV however long the others in its batch are.

    Rotary embeddings that switch to other frequencies past a length (longrope) are served up to there.
    """
    text = config.get_text_config(decoder=True)
    lengths = [length for name in _CONTEXT_LENGTH_NAMES if (length := getattr(text, name, None))]
    if not lengths:
        raise UnsupportedModel("The model's config.json states no context length.")
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = (rope, *(value for value in rope.values() if isinstance(value, dict)))
    switches = [rope["original_max_position_embeddings"] for rope in ropes if rope.get("rope_type") == "longrope"]
    return min(map(int, lengths + switches))


def _load_config(directory: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise UnsupportedModel(f"The configuration in {directory} cannot be used: {_first_line(error)}") from None


def _load_weights(directory: Path, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    register_paged_attention()
    register_probe_attention()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=PROBE_ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except _LOAD_ERRORS as error:
        raise UnsupportedModel(f"The model in {directory} cannot be loaded: {_first_line(error)}") from None
    model, info = loaded
    absent = sorted((*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])))
    if absent:
        raise UnsupportedModel(
            f"The weights in {directory} are incomplete: {len(absent)} are missing or misshapen, {absent[0]} for one."
        )
    return model


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."


def _eos_token_ids(directory: Path, config: Any, generation_config: Any) -> set[int]:
    """Every token that any of the model's files calls the end of sequence."""
    ids: set[int] = set()
    for source in (config, config.get_text_config(decoder=True), generation_config):
        value = getattr(source, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or ())
    return ids | _tokenizer_eos(directory)


def _tokenizer_eos(directory: Path) -> set[int]:
    """The id of the tokenizer's end-of-sequence token, read without building the tokenizer."""
    settings = _read_json(directory / "tokenizer_config.json")
    eos = settings.get("eos_token")
    content = eos.get("content") if isinstance(eos, dict) else eos
    if content is None:
        return set()
    added = {
        entry["content"]: entry["id"] for entry in _read_json(directory / "tokenizer.json").get("added_tokens", ())
    }
    added |= {entry["content"]: int(token) for token, entry in settings.get("added_tokens_decoder", {}).items()}
    return {added[content]} if content in added else set()


def _read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises UnsupportedModel where it is not JSON."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UnsupportedModel(f"{file} is not valid JSON.") from None
    return content if isinstance(content, dict) else {}
