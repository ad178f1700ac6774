"""One request inside the engine: its tokens, its blocks, and how far it has come."""

from dataclasses import dataclass, field
from enum import Enum

from baton.errors import InvalidRequest
from baton.ids import BlockHash, BlockId, RequestId, tenant_tag
from baton.sampling import PositionLogprobs
from engine.interface import EngineRequest, FinishReason, ModelInfo, Prefill, Retention
from engine.restoring import Restoring
from kvcache.block_hash import BlockHasher, root_hash
from kvcache.tiers.interface import Owner


class Stage(Enum):
    WAITING = "waiting"
    """In the queue, without blocks."""
    RESERVED = "reserved"
    """Holds blocks that another engine fills."""
    RUNNING = "running"
    """Takes part in steps."""
    HELD = "held"
    """Computed; holds its blocks until they have been sent."""


@dataclass(slots=True, eq=False)
class LiveSequence:
    """Mutable, owned by the scheduler and the engine core.

    `tokens` are prompt and output, and `output` starts with what was generated before the request came here. The
    keys and values of the first `computed` tokens lie in `blocks`, and the first `published` of the blocks are known
    to the prefix cache. Between steps a sequence that decodes has exactly one token left to compute, the one drawn
    last. While it is `restoring`, some of the computed tokens' keys and values are still on their way.
    """

    request: EngineRequest
    arrival: int
    """Its place among all requests of this engine: the lower goes first."""
    seed: int
    tokens_max: int
    """Prompt and output together; reaching it ends the sequence."""
    stop_token_ids: frozenset[int]
    hasher: BlockHasher
    prefill: Prefill = field(init=False)
    """Where the prompt is computed from now on: ELSEWHERE becomes HERE once this engine can go on alone."""
    tokens: list[int] = field(init=False)
    output: list[int] = field(init=False)
    owner: Owner = field(init=False)
    stage: Stage = Stage.WAITING
    blocks: list[BlockId] = field(default_factory=list)
    computed: int = 0
    published: int = 0
    found: int = 0
    """Blocks that it was last admitted with: found in the prefix cache, in whatever tier."""
    restoring: Restoring | None = None
    untold: int | None = None
    """Prefill.ONLY: the first block that was restored, until the layer listener is told of it and of those up to
    `found`."""
    broken_at: int | None = None
    """Reserved: the first block that could not be restored as it was. It is computed here in the end, with all after
    it."""
    cached_tokens: int = 0
    """Found in the prefix cache when it was first admitted."""
    restored_tokens: int = 0
    restore_s: float = 0.0
    """From when it was first admitted until these were there."""
    lost_tokens: int = 0
    """That it had computed when it was last preempted."""
    preemptions: int = 0
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prefill = self.request.prefill
        self.tokens = [*self.request.prompt, *self.request.generated]
        self.output = list(self.request.generated)
        self.owner = owner_of(self.request.retention)

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Every prompt position's logits are still to be reported, so none may come from the cache."""
        return self.request.sampling.prompt_logprobs is not None and not self.output

    @property
    def forbidden(self) -> frozenset[int]:
        """Tokens that must not be drawn next."""
        return self.stop_token_ids if len(self.output) < self.request.sampling.min_tokens else frozenset()

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.output.append(token)

    @property
    def finish_reason(self) -> FinishReason | None:
        """What the token drawn last means for the sequence on this engine."""
        if self.output[-1] in self.stop_token_ids:
            return FinishReason.STOP
        if len(self.tokens) >= self.tokens_max or self.prefill is Prefill.ONLY:
            return FinishReason.LENGTH
        return None

    def block_names(self) -> list[BlockHash]:
        """The names of all whole blocks of `tokens`."""
        self.hasher.extend(self.tokens[self.hasher.named_tokens :])
        return self.hasher.hashes


def owner_of(retention: Retention) -> Owner:
    return Owner(tenant_tag(retention.tenant), retention.ttl_s, retention.pin, retention.quota_bytes)


def check_request(request: EngineRequest, model: ModelInfo) -> None:
    """Raises InvalidRequest if no engine with this model could ever serve it."""
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        raise InvalidRequest("The prompt is empty; it needs at least one token.", "prompt")
    for name, tokens in (("prompt", prompt), ("generated", request.generated)):
        if tokens and (min(tokens) < 0 or max(tokens) >= model.vocabulary_size):
            raise InvalidRequest(f"Token ids must be from 0 to {model.vocabulary_size - 1}.", name)
    if request.known_tokens >= model.context_length:
        raise InvalidRequest(
            f"The prompt has {request.known_tokens} tokens, but the context of {model.context_length} must hold it "
            "and at least one more.",
            "prompt",
        )
    if request.generated:
        _check_unfinished(request, model)
    sampling.check_vocabulary(model.vocabulary_size)
    if sampling.prompt_logprobs is not None and not request.generated and request.prefill is not Prefill.HERE:
        raise InvalidRequest("prompt_logprobs need the prompt to be computed where it decodes.", "prompt_logprobs")
    if sampling.min_tokens and len(_stop_token_ids(request, model)) >= model.vocabulary_size:
        raise InvalidRequest("min_tokens leaves no token to draw: every one of them is a stop token.", "min_tokens")


def _check_unfinished(request: EngineRequest, model: ModelInfo) -> None:
    generated, max_tokens = request.generated, request.sampling.max_tokens
    if max_tokens is not None and len(generated) >= max_tokens:
        raise InvalidRequest(f"All {max_tokens} tokens were generated already.", "generated")
    if generated[-1] in _stop_token_ids(request, model):
        raise InvalidRequest("What was generated ends with a stop token; nothing comes after it.", "generated")


def begin_sequence(request: EngineRequest, model: ModelInfo, arrival: int, seed: int) -> LiveSequence:
    """Of a checked request."""
    layout = model.layout
    room = model.context_length - len(request.prompt)
    return LiveSequence(
        request=request,
        arrival=arrival,
        seed=seed,
        tokens_max=len(request.prompt) + min(room, request.sampling.max_tokens or room),
        stop_token_ids=_stop_token_ids(request, model),
        hasher=BlockHasher(root_of(model, request.cache_salt), layout.block_tokens),
    )


def root_of(model: ModelInfo, cache_salt: str) -> BlockHash:
    """What the names of a prompt's blocks follow from."""
    layout = model.layout
    return root_hash(model.fingerprint, layout.block_tokens, layout.dtype, cache_salt=cache_salt)


def _stop_token_ids(request: EngineRequest, model: ModelInfo) -> frozenset[int]:
    stops = frozenset(request.sampling.stop_token_ids)
    return stops if request.sampling.ignore_eos else stops | model.eos_token_ids
