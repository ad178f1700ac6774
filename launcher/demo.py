"""`baton demo`: a whole Baton answers questions about a long ledger, and shows where one request's time went."""

import asyncio
import json
import random
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from baton.errors import Unavailable
from baton.settings import RECALL_MODEL, UpSettings, load_settings
from launcher.process import run_service
from launcher.progress import Progress
from launcher.timeline import Timeline, render
from launcher.up import Deployment

if TYPE_CHECKING:
    from engine.recall.text import Ledger

LEDGER_LINES = 500
QUESTIONS_KNOWN = 4
"""Besides one about a locker that the ledger does not name."""
TAIL_LINES = 5
ANSWER_TIMEOUT_S = 120.0
SETTINGS = {
    "model": RECALL_MODEL,
    "prefill": 1,
    "decode": 1,
    "http_port": 0,
    "grpc_port": 0,
    "log_level": "warning",
    "self_test": False,
}
"""Without the self-test the two workers take themselves for equally fast, so the first prompt is computed apart."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for the question who owns a locker."""

    locker: str
    owner: str
    answer: str
    prompt_tokens: int
    cached_tokens: int
    timeline: Timeline

    @property
    def is_right(self) -> bool:
        return self.answer == self.owner

    @property
    def is_disaggregated(self) -> bool:
        """Whether the prefill worker computed it and its KV blocks came over."""
        return bool(self.timeline["transport"])


def run_demo(*, as_json: bool) -> bool:
    """Whether every answer was right, and at least one request's prefill ran on the prefill worker."""
    settings = load_settings(UpSettings, SETTINGS)
    stdout = sys.stdout  # as it is now: while Ray runs it is another
    console = Console(file=stdout, quiet=as_json, highlight=False)
    answers = run_service(
        Deployment(settings, Progress()), lambda deployment: ask_all(deployment, console), settings.drain_timeout_s
    )
    if answers is None:  # a signal ended it
        return False
    if as_json:
        print(json.dumps(summary(answers), indent=2))
    return is_success(answers)


def is_success(answers: Sequence[Answer]) -> bool:
    return all(answer.is_right for answer in answers) and any(answer.is_disaggregated for answer in answers)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "is_success": is_success(answers),
        "answers": [asdict(answer) | {"is_right": answer.is_right} for answer in answers],
    }


async def ask_all(deployment: Deployment, console: Console) -> Sequence[Answer]:
    """Asks one question after the other and prints what happens; the first finds every cache cold."""
    from engine.recall.text import make_ledger

    seed = secrets.randbits(32)
    ledger = make_ledger(LEDGER_LINES, seed)
    console.print(f"A ledger of {LEDGER_LINES} lines, drawn just now, ends:\n")
    console.print("  ...", *(f"  {line}" for line in ledger.text.splitlines()[-TAIL_LINES:]), "", sep="\n")
    answers = []
    for locker in choose_lockers(ledger, random.Random(seed)):
        async with Progress().step("waiting for the answer"):
            answers.append(await asyncio.to_thread(ask, deployment.router.url, ledger, locker))
        console.print(described(answers[-1]))
    show_timeline(answers, console)
    return answers


def choose_lockers(ledger: "Ledger", chance: random.Random) -> Sequence[str]:
    from engine.recall.text import LOCKERS

    unknown = [locker for locker in LOCKERS if locker not in ledger.owners]
    return [*chance.sample(list(ledger.owners), QUESTIONS_KNOWN), chance.choice(unknown)]


def ask(url: str, ledger: "Ledger", locker: str) -> Answer:
    """One chat completion over HTTP, as any client would ask for it. Raises Unavailable if none comes back."""
    from engine.recall.text import question

    messages = [{"role": "system", "content": ledger.text}, {"role": "user", "content": question(locker)}]
    body = {"model": RECALL_MODEL, "messages": messages, "temperature": 0, "timeline": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:
            reply = json.load(response)
    except OSError as error:  # urllib's errors are OSErrors, too
        raise Unavailable(f"The demo's question was not answered: {error}.") from None
    usage = reply["usage"]
    return Answer(
        locker,
        ledger.owner(locker),
        reply["choices"][0]["message"]["content"].strip().removesuffix("."),
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        reply["timeline"],
    )


def described(answer: Answer) -> str:
    mark = "[green]✓[/]" if answer.is_right else f"[red]✗ (it is {answer.owner})[/]"
    where = ", prefilled apart" if answer.is_disaggregated else ""
    return (
        f"  who owns locker {answer.locker}? {answer.answer} {mark}"
        f" [dim]{answer.prompt_tokens:,} tokens, {answer.cached_tokens:,} cached{where}[/]"
    )


def show_timeline(answers: Sequence[Answer], console: Console) -> None:
    shown = next((answer for answer in answers if answer.is_disaggregated), answers[0])
    workers = " → ".join(filter(None, (shown.timeline["prefill_worker"], shown.timeline["decode_worker"])))
    console.print(f"\nWhere the time of the question about {shown.locker} went ({workers}):\n")
    console.print(render(shown.timeline))
