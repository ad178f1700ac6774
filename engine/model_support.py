"""Which models the paged engine serves right, and why it refuses the others.

The configuration is asked first, without loading a weight. Then, with the model in memory, one forward of
two tokens shows what its layers really ask of attention: a family that transformers adds tomorrow is
judged by what it does, not by a list of names.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.errors import UnsupportedModel
from engine.attention import STEP_ARGUMENT
from engine.kernels import AttentionOptions

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_HARMLESS_TENSORS = {"position_ids", "cache_position"}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What all layers of a model have in common."""

    layers: int
    kv_heads: int
    head_dim: int


def check_config(config: Any) -> None:
    """Raises UnsupportedModel with the reason when the configuration alone tells."""
    text = config.get_text_config(decoder=True)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYER_TYPES)
    reasons = {
        "it is an encoder-decoder model": config.is_encoder_decoder,
        "it is an encoder, which does not generate": getattr(text, "is_causal", True) is False
        or bool(getattr(text, "use_bidirectional_attention", False)),
        f"it has layers of {', '.join(others)}, whose state is not a KV cache over all positions": bool(others),
        "its attention is cut into chunks": getattr(text, "attention_chunk_size", None) is not None,
        "its layers share one another's KV cache": bool(getattr(text, "num_kv_shared_layers", 0)),
    }
    _refuse_if(config.model_type, reasons)


def check_class(model: Any) -> None:
    """Raises UnsupportedModel with the reason when the model's class tells."""
    reasons = {
        "it is recurrent or a hybrid with recurrent layers": bool(getattr(model, "_is_stateful", False)),
        "its transformers code does not let its attention be replaced": not model._supports_attention_backend,
    }
    _refuse_if(model.config.model_type, reasons)


@torch.inference_mode()
def probe(model: Any) -> tuple[AttentionShape, int]:
    """What its layers ask of attention, and how many logits a position has.

    Raises UnsupportedModel when any layer asks for what the pool cannot hold or the kernels cannot compute.
    """
    seen = _Probe(model.config.model_type)
    two = torch.tensor([[0, 1]], device=model.device)
    logits = model(input_ids=two, position_ids=two, use_cache=False, **{STEP_ARGUMENT: seen}).logits
    return seen.shape(model.config.get_text_config(decoder=True).num_hidden_layers), logits.shape[-1]


class _Probe:
    """Stands in for a step: answers with zeros and remembers what it was asked."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._layers: list[tuple[int, int, int]] = []

    def check(self, module: torch.nn.Module, extra: dict[str, Any]) -> None:
        is_causal = extra.get("is_causal", getattr(module, "is_causal", True))
        foreign = sorted(
            name for name, value in extra.items() if isinstance(value, Tensor) and name not in _HARMLESS_TENSORS
        )
        _refuse_if(
            self._family,
            {
                "its attention also looks ahead": is_causal is False,
                f"its attention takes {', '.join(foreign)}, which paged attention does not know": bool(foreign),
                "its attention layers carry no index": not isinstance(getattr(module, "layer_idx", None), int),
            },
        )

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        del options
        if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
            _refuse_if(self._family, {"its keys and values have different sizes": True})
        layer: int = module.layer_idx  # type: ignore[assignment]
        self._layers.append((layer, key.shape[1], key.shape[2]))
        return torch.zeros_like(query)

    def shape(self, layers: int) -> AttentionShape:
        indices = sorted(layer for layer, _, _ in self._layers)
        shapes = {shape for _, *shape_ in self._layers for shape in [tuple(shape_)]}
        _refuse_if(
            self._family,
            {
                f"of its {layers} layers not each calls attention once": indices != list(range(layers)),
                "its layers have different numbers of KV heads or head sizes": len(shapes) > 1,
            },
        )
        kv_heads, head_dim = shapes.pop()
        return AttentionShape(layers, kv_heads, head_dim)


def _refuse_if(family: str, reasons: dict[str, bool]) -> None:
    """`reasons` maps what would be wrong to whether it is."""
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModel(f"Models of the family {family} cannot be served: {reason}.")
