"""What is loaded, what is refused and with which words."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from baton.errors import SettingsError, UnsupportedModel
from engine.model.loader import choose_device, context_length, load_model
from engine.model.source import find_model
from engine.model.support import _is_plain, _sampled_mask, check_class, check_config
from tests.engine.tiny_models import CONTEXT_LENGTH, EOS_TOKEN_ID, FAMILIES, VOCABULARY_SIZE, make_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A llama of one's own to damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


# ---- what is loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_facts(family: str, tmp_path: Path) -> None:
    loaded = load_model(str(make_model(family, tmp_path)), device="cpu")
    facts = loaded.facts
    assert (facts.layers, facts.kv_heads, facts.head_dim) == (4, 2, 16)
    assert (facts.context_length, facts.vocabulary_size) == (CONTEXT_LENGTH, VOCABULARY_SIZE)
    assert facts.eos_token_ids == {EOS_TOKEN_ID}
    assert loaded.dtype_name == "float32" and loaded.keeps_logits and not loaded.model.training


def test_dtype_is_the_checkpoints_or_as_asked(copy: Path) -> None:
    assert load_model(str(copy), device="cpu", dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16
    edit_json(copy / "config.json", dtype="float16")
    assert load_model(str(copy), device="cpu").dtype == torch.float16
    with pytest.raises(UnsupportedModel, match="dtype int8"):
        load_model(str(copy), device="cpu", dtype="int8")


def test_every_file_may_name_ends_of_sequence(copy: Path) -> None:
    edit_json(copy / "generation_config.json", eos_token_id=[5, 6])
    edit_json(copy / "tokenizer_config.json", eos_token="<end>", added_tokens_decoder={"9": {"content": "<end>"}})
    assert load_model(str(copy), device="cpu").facts.eos_token_ids == {EOS_TOKEN_ID, 5, 6, 9}


def test_the_tokenizers_end_of_sequence_is_found_in_its_own_file(copy: Path) -> None:
    edit_json(copy / "tokenizer_config.json", eos_token={"content": "<end>"})
    edit_json(copy / "tokenizer.json", added_tokens=[{"id": 8, "content": "<end>"}])
    assert load_model(str(copy), device="cpu").facts.eos_token_ids == {EOS_TOKEN_ID, 8}


def test_longrope_is_served_as_far_as_its_frequencies_stay() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_parameters=rope | {"rope_theta": 1e4, "original_max_position_embeddings": 128},
    )
    assert context_length(config) == 128
    assert context_length(LlamaConfig(max_position_embeddings=512)) == 512


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("tpu", "cuda:x", "cpu:1"):
        with pytest.raises(SettingsError, match=f"not {name}"):
            choose_device(name)
    with pytest.raises(SettingsError, match="cuda:99 is not there"):
        choose_device("cuda:99")


# ---- the fingerprint


def test_fingerprint_is_of_weights_configuration_and_dtype(llama: Path, copy: Path, tmp_path: Path) -> None:
    def fingerprint(directory: Path, dtype: str = "auto") -> str:
        return load_model(str(directory), device="cpu", dtype=dtype).facts.fingerprint

    own = fingerprint(llama)
    assert fingerprint(copy) == own
    edit_json(copy / "generation_config.json", eos_token_id=3)
    assert fingerprint(copy) == own
    assert fingerprint(llama, "bfloat16") != own
    assert fingerprint(make_model("llama", tmp_path / "other", seed=1)) != own
    edit_json(copy / "config.json", rms_norm_eps=1e-3)
    assert fingerprint(copy) != own


# ---- what is not there


def test_missing_directories_and_files() -> None:
    with pytest.raises(SettingsError, match=r"/no/such/model does not exist"):
        find_model("/no/such/model")
    with pytest.raises(SettingsError, match="is a file"):
        find_model(__file__)


def test_a_directory_without_a_model(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"holds no config\.json"):
        find_model(str(tmp_path))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"no \.safetensors files"):
        find_model(str(copy))


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("engine.model.source.snapshot_download", unreachable)
    with pytest.raises(SettingsError, match=r"no model some/model: .* the hub cannot be reached"):
        find_model("some/model")


def test_a_hub_id_in_the_cache_needs_no_hub(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        assert local_files_only
        return str(llama)

    monkeypatch.setattr("engine.model.source.snapshot_download", cached)
    assert find_model("some/model") == llama


def test_broken_files(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load_model(str(copy), device="cpu")
    (copy / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"configuration in .* cannot be used"):
        load_model(str(copy), device="cpu")
    (copy / "config.json").write_text('{"model_type": "made-up"}')
    with pytest.raises(UnsupportedModel, match=r"configuration in .* cannot be used"):
        load_model(str(copy), device="cpu")


def test_missing_weights_are_not_made_up(copy: Path) -> None:
    edit_json(copy / "config.json", num_hidden_layers=5)
    with pytest.raises(UnsupportedModel, match=r"weights in .* are incomplete: 9 are missing"):
        load_model(str(copy), device="cpu")


# ---- what cannot be served


def refused(model: Any, directory: Path) -> str:
    model.save_pretrained(directory)
    with pytest.raises(UnsupportedModel) as caught:
        load_model(str(directory), device="cpu")
    return str(caught.value)


def test_encoder_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    assert "encoder-decoder" in refused(T5ForConditionalGeneration(config), tmp_path)


def test_recurrent(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    assert "layers of linear_attention" in refused(AutoModelForCausalLM.from_config(config), tmp_path)


def test_classes_that_tell() -> None:
    served = {"_is_stateful": False, "_supports_attention_backend": True}
    check_class("odd", SimpleNamespace(**served))
    for changes, reason in (
        ({"_is_stateful": True}, "recurrent"),
        ({"_supports_attention_backend": False}, "replaced"),
    ):
        with pytest.raises(UnsupportedModel, match=reason):
            check_class("odd", SimpleNamespace(**served | changes))


def test_keys_and_values_of_different_sizes(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
    )
    assert "different sizes" in refused(AutoModelForCausalLM.from_config(config), tmp_path)


@pytest.mark.parametrize(
    ("mask_function", "window", "is_plain"),
    [
        (causal_mask_function, None, True),
        (causal_mask_function, 64, False),
        (sliding_window_causal_mask_function(64), 64, True),
        (sliding_window_causal_mask_function(64), None, False),
        (sliding_window_causal_mask_function(64), 65, False),
        (chunked_causal_mask_function(100, torch.zeros(1, dtype=torch.long)), None, False),
        (bidirectional_mask_function, None, False),
    ],
)
def test_masks_that_say_other_than_the_arguments(mask_function: Any, window: int | None, is_plain: bool) -> None:
    """Some models tell their window to the mask alone, so that paged attention would see too far."""
    mask = _sampled_mask(mask_function=mask_function, device=torch.device("cpu"))
    assert _is_plain(mask, window) is is_plain


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of linear_attention"),
        ({"attention_chunk_size": 128}, "cut into chunks"),
        ({"num_kv_shared_layers": 1}, "share one another's KV"),
        ({"is_causal": False}, "encoder"),
        ({"use_bidirectional_attention": True}, "encoder"),
    ],
)
def test_configurations_that_tell(changes: dict[str, Any], reason: str) -> None:
    config = LlamaConfig(num_hidden_layers=2)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModel, match=reason):
        check_config(config)
