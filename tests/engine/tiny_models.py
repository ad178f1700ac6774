"""Tiny random models of the families that the engine serves, and what transformers itself generates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers import logging as transformers_logging
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

VOCABULARY_SIZE = 211
EOS_TOKEN_ID = 1
CONTEXT_LENGTH = 512
SLIDING_WINDOW = 24

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": 0,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2


@dataclass(frozen=True, slots=True)
class Family:
    config: Callable[..., PreTrainedConfig]
    extra: dict[str, Any]

    def build_config(self) -> PreTrainedConfig:
        return self.config(**{**_SIZES, **self.extra})


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaConfig, {}),
    "qwen2": Family(Qwen2Config, {"use_sliding_window": False}),
    "qwen3": Family(Qwen3Config, {}),
    "mistral": Family(MistralConfig, {"sliding_window": SLIDING_WINDOW}),
    "gemma2": Family(
        Gemma2Config,
        {
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _ALTERNATING,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": Family(
        Gemma3TextConfig,
        {"sliding_window": SLIDING_WINDOW, "layer_types": _ALTERNATING, "query_pre_attn_scalar": 16},
    ),
    "mixtral": Family(MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family(
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
    ),
}


def make_model(family: str, directory: Path, seed: int = 0) -> Path:
    """Saves a random float32 model of that family as a Hugging Face directory, without a tokenizer."""
    config = FAMILIES[family].build_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _spread_weights(model)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=EOS_TOKEN_ID, pad_token_id=2)
    _quietly(lambda: model.save_pretrained(directory, safe_serialization=True))
    return directory


def _spread_weights(model: torch.nn.Module) -> None:
    """Weights of the usual 0.02 repeat one token for ever; these make every layer and every position matter."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            fan_in = 1 if "embed" in name else weight.shape[-1]
            weight.data.normal_(0, 1.5 * fan_in**-0.5)
        elif "bias" in name:
            weight.data.normal_(0, 0.3)
        else:
            weight.data.add_(torch.randn_like(weight) * 0.1)


def random_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCABULARY_SIZE, (length,), generator=generator).tolist())


def reference(directory: Path, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """What transformers' own greedy generate continues the prompt with, in float32, past any end of sequence."""
    return list(_reference(directory, tuple(prompt), max_new_tokens))


@cache
def _reference(directory: Path, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
    with torch.inference_mode():
        output = _reference_model(directory).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
        )
    return tuple(output[0, len(prompt) :].tolist())


@cache
def _reference_model(directory: Path) -> Any:
    return _quietly(
        lambda: AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
    )


def _quietly(action: Callable[[], Any]) -> Any:
    """Without the progress bar on stderr."""
    transformers_logging.disable_progress_bar()
    return action()
