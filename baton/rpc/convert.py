"""Between the house's own types and their messages."""

from baton.layout import KVLayout
from baton.rpc import common_pb2, transfer_pb2
from baton.sampling import PositionLogprobs, SamplingParams, TokenLogprob

_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
)


def sampling_to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    scalars = {name: getattr(params, name) for name in _SCALARS if getattr(params, name) is not None}
    return common_pb2.SamplingParams(
        logit_bias=dict(params.logit_bias), stop_token_ids=params.stop_token_ids, **scalars
    )


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    """Unset fields take their defaults; raises InvalidRequest as SamplingParams does."""
    scalars = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    return SamplingParams(logit_bias=dict(message.logit_bias), stop_token_ids=tuple(message.stop_token_ids), **scalars)


def layout_to_proto(layout: KVLayout) -> transfer_pb2.KVLayout:
    return transfer_pb2.KVLayout(
        layers=layout.layers,
        blocks=layout.blocks,
        block_tokens=layout.block_tokens,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
    )


def layout_from_proto(message: transfer_pb2.KVLayout) -> KVLayout:
    return KVLayout(
        layers=message.layers,
        blocks=message.blocks,
        block_tokens=message.block_tokens,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        dtype=message.dtype,
    )


def logprobs_to_proto(position: PositionLogprobs) -> common_pb2.PositionLogprobs:
    return common_pb2.PositionLogprobs(
        tokens=[common_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob) for token in position]
    )


def logprobs_from_proto(message: common_pb2.PositionLogprobs) -> PositionLogprobs:
    return tuple(TokenLogprob(token.token_id, token.logprob) for token in message.tokens)
