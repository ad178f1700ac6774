"""The kernels against attention written out in full, position by position."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import engine.attention.varlen_kernel
from baton.errors import UnsupportedModel
from engine.attention.kernels import Accelerator, AttentionOptions, Kernel, choose_kernel
from engine.attention.paged import PAGED_ATTENTION, PagedAttention, paged_attention, register_paged_attention
from engine.attention.step_plan import StepPlan, slot_index, slot_runs
from engine.attention.torch_kernel import torch_attention
from engine.attention.varlen_kernel import VarlenStep, window_size
from engine.batch import Row

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
BLOCK_TOKENS, BLOCKS = 4, 64
CPU = torch.device("cpu")


def row(queries: int, start: int, blocks: list[int]) -> Row:
    return Row("r", tuple(range(queries)), start, blocks, samples=True)  # type: ignore[arg-type]


def shuffled(seed: int) -> list[int]:
    return torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()


def mixed_rows() -> list[Row]:
    """Decode rows and chunks, over adjacent blocks, over two runs and over many."""
    blocks = shuffled(0)
    return [
        row(1, 21, [40, 41, 42, 43, 44, 45]),
        row(5, 0, blocks[:2]),
        row(1, 50, blocks[2:15]),
        row(7, 30, [50, 51, 52, 53, 54, 46, 47, 48, 49, 55]),
        row(1, 0, [56]),
        row(9, 40, blocks[15:28]),
    ]


def written_out(query: Tensor, pool: Tensor, rows: list[Row], options: AttentionOptions) -> Tensor:
    """[tokens, heads, d]: the definition, in float64, one query and head at a time."""
    outputs, first = [], 0
    for r in rows:
        for offset in range(len(r.token_ids)):
            position = r.start + offset
            oldest = 0 if options.window is None else max(0, position - options.window + 1)
            slots = [r.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in range(oldest, position + 1)]
            keys, values = (pool[kv].flatten(0, 1)[slots].double() for kv in (0, 1))
            outputs.append(torch.stack([one_head(query[first], keys, values, h, options) for h in range(HEADS)]))
            first += 1
    return torch.stack(outputs)


def one_head(query: Tensor, keys: Tensor, values: Tensor, head: int, options: AttentionOptions) -> Tensor:
    kv_head = head // (HEADS // KV_HEADS)
    scores = keys[:, kv_head] @ query[head].double() * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    weights = scores.exp()
    total = weights.sum() + (0 if options.sinks is None else options.sinks[head].double().exp())
    return weights @ values[:, kv_head] / total


def random_step(rows: list[Row], dtype: torch.dtype) -> tuple[StepPlan, Tensor, Tensor]:
    torch.manual_seed(1)
    plan = StepPlan(rows, BLOCK_TOKENS, CPU)
    pool = torch.randn(2, BLOCKS, BLOCK_TOKENS, KV_HEADS, HEAD_DIM).to(dtype)
    return plan, torch.randn(plan.tokens, HEADS, HEAD_DIM).to(dtype), pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(0.3),
        AttentionOptions(0.3, window=6),
        AttentionOptions(0.3, window=1),
        AttentionOptions(0.3, window=1000),
        AttentionOptions(0.5, softcap=2.0),
        AttentionOptions(0.3, window=11, softcap=2.0, sinks=torch.linspace(-1, 3, HEADS)),
    ],
    ids=lambda options: f"{options.window}-{options.softcap}-{options.sinks is not None}",
)
@pytest.mark.parametrize("run_tokens_min", [1, 1024])
def test_torch_attention_is_attention(
    options: AttentionOptions, dtype: torch.dtype, run_tokens_min: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr("engine.attention.step_plan.RUN_TOKENS_MIN", run_tokens_min)
    monkeypatch.setattr("engine.attention.torch_kernel.SLICE_QUERIES", 3)
    rows = mixed_rows()
    plan, query, pool = random_step(rows, dtype)
    keys, values = (pool[kv].flatten(0, 1) for kv in (0, 1))
    expected = written_out(query, pool, rows, options)
    got = torch_attention(plan, query, keys, values, options).double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (got - expected).abs().max() < tolerance


def test_only_decode_rows_and_only_chunks_agree_with_the_mix() -> None:
    rows = mixed_rows()
    plan, query, pool = random_step(rows, torch.float32)
    keys, values = (pool[kv].flatten(0, 1) for kv in (0, 1))
    mixed = torch_attention(plan, query, keys, values, AttentionOptions(0.3))
    for span, alone in zip(plan.spans, rows, strict=True):
        own = slice(span.first, span.first + span.queries)
        single = torch_attention(StepPlan([alone], BLOCK_TOKENS, CPU), query[own], keys, values, AttentionOptions(0.3))
        torch.testing.assert_close(single, mixed[own])


def test_scores_stay_within_their_bound(monkeypatch: Any) -> None:
    rows = [row(40, 0, shuffled(3))]
    plan, query, pool = random_step(rows, torch.float32)
    keys, values = (pool[kv].flatten(0, 1) for kv in (0, 1))
    expected = torch_attention(plan, query, keys, values, AttentionOptions(0.3))
    monkeypatch.setattr("engine.attention.torch_kernel.SCORES_MAX", HEADS * 40 * 2)
    torch.testing.assert_close(torch_attention(plan, query, keys, values, AttentionOptions(0.3)), expected)


# ---- where a row's KV lies


@given(st.data())
def test_slot_runs_and_slot_index_name_the_same_slots(data: st.DataObject) -> None:
    block_tokens = data.draw(st.integers(1, 5))
    count = data.draw(st.integers(1, 12))
    blocks = data.draw(st.lists(st.integers(0, 15), min_size=count, max_size=count, unique=True))
    end = data.draw(st.integers(1, count * block_tokens))
    begin = data.draw(st.integers(0, end - 1))
    expected = [blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(begin, end)]
    runs = slot_runs(blocks, block_tokens, begin, end)  # type: ignore[arg-type]
    assert [slot for low, high in runs for slot in range(low, high)] == expected
    assert slot_index(blocks, block_tokens, begin, end).tolist() == expected  # type: ignore[arg-type]
    assert all(high != low for (_, high), (low, _) in pairwise(runs)), "adjacent runs are one run"


def test_long_runs_are_read_in_place_and_short_ones_copied(monkeypatch: Any) -> None:
    scattered = list(range(0, 20, 2))
    plan = StepPlan([row(1, 30, list(range(8))), row(1, 35, scattered)], BLOCK_TOKENS, CPU)
    assert plan.read(plan.spans[0], None) == (slice(0, 31),)
    copied = plan.read(plan.spans[1], None)
    assert isinstance(copied, Tensor) and len(copied) == 36
    assert plan.read(plan.spans[1], 3) == (slice(65, 68),)
    monkeypatch.setattr("engine.attention.step_plan.RUN_TOKENS_MIN", 2)
    assert plan.read(plan.spans[1], 5) == (slice(59, 60), slice(64, 68))


# ---- which kernel


H100 = Accelerator("cuda", (9, 0))


@pytest.mark.parametrize(
    ("accelerator", "dtype", "head_dim", "block_tokens", "options", "kernel"),
    [
        (Accelerator("cpu"), torch.bfloat16, 128, 256, AttentionOptions(1.0), Kernel.TORCH),
        (H100, torch.bfloat16, 128, 256, AttentionOptions(1.0, window=8), Kernel.VARLEN_PAGED),
        (H100, torch.bfloat16, 128, 32, AttentionOptions(1.0), Kernel.VARLEN_COPIED),
        (Accelerator("cuda", (9, 0), "FA3"), torch.bfloat16, 128, 32, AttentionOptions(1.0), Kernel.VARLEN_PAGED),
        (Accelerator("cuda", (10, 0), "FA4"), torch.bfloat16, 128, 256, AttentionOptions(1.0), Kernel.VARLEN_COPIED),
        (Accelerator("cuda", (7, 5)), torch.float16, 128, 256, AttentionOptions(1.0), Kernel.TORCH),
        (H100, torch.float32, 128, 256, AttentionOptions(1.0), Kernel.TORCH),
        (H100, torch.float16, 512, 256, AttentionOptions(1.0), Kernel.TORCH),
        (H100, torch.float16, 36, 256, AttentionOptions(1.0), Kernel.TORCH),
        (H100, torch.float16, 128, 256, AttentionOptions(1.0, softcap=50.0), Kernel.TORCH),
        (H100, torch.float16, 128, 256, AttentionOptions(1.0, sinks=torch.zeros(1)), Kernel.TORCH),
    ],
)
def test_choose_kernel(
    accelerator: Accelerator,
    dtype: torch.dtype,
    head_dim: int,
    block_tokens: int,
    options: AttentionOptions,
    kernel: Kernel,
) -> None:
    assert choose_kernel(accelerator, dtype, head_dim, block_tokens, options) is kernel


def test_an_accelerator_is_described_without_asking_cuda_about_the_cpu() -> None:
    assert Accelerator.of(CPU) == Accelerator("cpu")


# ---- what the CUDA path asks of torch's kernel, by a stand-in that follows the kernel's documentation


def documented_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    num_splits: int,
) -> Tensor:
    assert enable_gqa and num_splits == 1 and cu_seq_q.dtype == torch.int32
    outputs = []
    for sequence, (low, high) in enumerate(pairwise(cu_seq_q.tolist())):
        if block_table is not None:
            assert seqused_k is not None and cu_seq_k is None and block_table.dtype == torch.int32
            length = int(seqused_k[sequence])
            keys, values = (pool[block_table[sequence]].flatten(0, 1)[:length] for pool in (key, value))
        else:
            assert cu_seq_k is not None and seqused_k is None
            begin, end = cu_seq_k[sequence : sequence + 2].tolist()
            keys, values = key[begin:end], value[begin:end]
        assert high - low <= max_q and len(keys) <= max_k
        outputs.append(bottom_right(query[low:high], keys, values, scale, window_size[0]))
    return torch.cat(outputs)


def bottom_right(query: Tensor, keys: Tensor, values: Tensor, scale: float, left: int) -> Tensor:
    """Causal, the last query over the last key; `left` keys before the query's own, -1 for all."""
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, keys.repeat_interleave(group, 1)) * scale
    age = torch.arange(len(query))[:, None] + len(keys) - len(query) - torch.arange(len(keys))[None]
    hidden = (age < 0) | ((age > left) if left >= 0 else torch.zeros_like(age, dtype=torch.bool))
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))


@pytest.mark.parametrize("kernel", [Kernel.VARLEN_PAGED, Kernel.VARLEN_COPIED])
@pytest.mark.parametrize("window", [None, 1, 6])
def test_the_varlen_call_means_the_same(kernel: Kernel, window: int | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine.attention.varlen_kernel, "varlen_attn", documented_varlen_attn)
    rows, options = mixed_rows(), AttentionOptions(0.3, window=window)
    plan, query, pool = random_step(rows, torch.float32)
    got = VarlenStep(plan).attend(kernel, query, pool[0], pool[1], options)
    torch.testing.assert_close(got.double(), written_out(query, pool, rows, options), atol=1e-5, rtol=0)


def test_window_size_does_not_count_the_query() -> None:
    assert window_size(None) == (-1, 0)
    assert window_size(1) == (0, 0)
    assert window_size(4096) == (4095, 0)


# ---- the function that layers call


def test_new_kv_is_written_before_the_listener_hears_and_attention_reads() -> None:
    rows = [row(3, 2, [7, 3]), row(1, 4, [9, 1])]
    plan = StepPlan(rows, BLOCK_TOKENS, CPU)
    pages = torch.zeros(2, 2, BLOCKS, BLOCK_TOKENS, KV_HEADS, HEAD_DIM)
    heard: list[tuple[int, Tensor]] = []
    attention = PagedAttention(plan, pages, Accelerator("cpu"), lambda layer: heard.append((layer, pages.clone())))
    states = [torch.randn(1, heads, 4, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    layer: Any = SimpleNamespace(layer_idx=1)
    output, weights = paged_attention(layer, *states, None, scaling=0.3, baton_attention=attention)
    assert weights is None and output.shape == (1, 4, HEADS, HEAD_DIM)
    (told, seen), slots = heard[0], [7 * 4 + 2, 7 * 4 + 3, 3 * 4 + 0, 1 * 4 + 0]
    assert told == 1
    for kv in (0, 1):
        torch.testing.assert_close(seen[1, kv].flatten(0, 1)[slots], states[1 + kv][0].transpose(0, 1))
        assert seen[1, kv].count_nonzero() == 4 * KV_HEADS * HEAD_DIM and not seen[0].any()
    expected = written_out(states[0][0].transpose(0, 1), pages[1], rows, AttentionOptions(0.3))
    torch.testing.assert_close(output[0].double(), expected, atol=1e-5, rtol=0)


def test_a_model_that_drops_keyword_arguments_is_refused() -> None:
    states = [torch.randn(1, heads, 4, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    with pytest.raises(UnsupportedModel, match="does not pass keyword arguments"):
        paged_attention(torch.nn.Identity(), *states, None)


def test_transformers_knows_the_attention_and_builds_no_mask_for_it() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register_paged_attention()
    assert PAGED_ATTENTION in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert PAGED_ATTENTION not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
