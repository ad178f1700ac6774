"""What the HTTP and the gRPC door share: from a checked request to sequences that can be started."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from baton.clock import Clock
from baton.settings import RouterSettings
from router.admission import Admission
from router.generation import Generator
from router.metrics import RouterMetrics
from router.prompts import PromptEncoder
from router.sequence import SequenceRequest

SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class Frontend:
    settings: RouterSettings
    admission: Admission
    prompts: PromptEncoder
    generator: Generator
    metrics: RouterMetrics
    clock: Clock
    wall_clock: Clock
    """Seconds since 1970."""
    draw_seed: Callable[[], int]
    """SEED_BITS random bits."""

    def sequences(
        self,
        prompts: Sequence[tuple[int, ...]],
        template: SequenceRequest,
        choices: int = 1,
        max_tokens_default: int | None = None,
    ) -> list[SequenceRequest]:
        """`choices` continuations of each prompt, in the order of the API's index, each with a seed of its own.

        The template says everything but prompt and choice; its sampling may lack `max_tokens` and `seed`.

        Raises InvalidRequest if a prompt does not fit, Unavailable while no decode worker is ready.
        """
        facts = self.generator.facts()
        requests = []
        for prompt in prompts:
            facts.check_prompt(prompt)
            sampling = facts.complete(template.sampling, len(prompt), self.draw_seed(), max_tokens_default)
            assert sampling.seed is not None
            for choice in range(choices):
                own = sampling.with_changes(seed=(sampling.seed + choice) % 2**64)
                requests.append(replace(template, prompt=prompt, sampling=own, choice=choice))
        return requests
