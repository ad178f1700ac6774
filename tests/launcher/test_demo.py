import random
from typing import Any

import pytest

from engine.recall.text import NOBODY, make_ledger
from launcher.demo import QUESTIONS_KNOWN, Answer, choose_lockers, described, is_success, summary


def answer(given: str = "Ada", transport: str = "shm") -> Answer:
    timeline: dict[str, Any] = {"transport": transport}
    return Answer("red-17", "Ada", given, prompt_tokens=4012, cached_tokens=0, timeline=timeline)


@pytest.mark.parametrize(
    ("answers", "success"),
    [
        ([answer(), answer(transport="")], True),
        ([answer(), answer("Bela")], False),
        ([answer(transport="")], False),
    ],
)
def test_success_is_all_right_and_at_least_one_prefilled_apart(answers: list[Answer], success: bool) -> None:
    assert is_success(answers) == success
    assert summary(answers)["is_success"] == success
    assert [one["is_right"] for one in summary(answers)["answers"]] == [one.is_right for one in answers]


def test_a_wrong_answer_tells_the_right_one() -> None:
    assert "✓" in described(answer())
    assert "✗" in described(answer("Bela")) and "it is Ada" in described(answer("Bela"))


def test_one_question_is_about_a_locker_that_nobody_owns() -> None:
    ledger = make_ledger(50, seed=1)
    lockers = choose_lockers(ledger, random.Random(1))
    owners = [ledger.owner(locker) for locker in lockers]
    assert len(set(lockers)) == QUESTIONS_KNOWN + 1 and owners.count(NOBODY) == 1
