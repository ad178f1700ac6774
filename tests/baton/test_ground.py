"""The small things of the ground floor: clock, ids, errors."""

import pickle

import pytest

from baton.clock import ManualClock, monotonic
from baton.errors import BatonError, InvalidRequest, ModelNotFound, Overloaded
from baton.ids import new_request_id, new_worker_id


def test_a_manual_clock_stands_still_until_told() -> None:
    clock = ManualClock(5.0)
    assert clock() == clock() == 5.0
    clock.advance(0.5)
    assert clock() == 5.5
    with pytest.raises(AssertionError):
        clock.advance(-1)


def test_the_real_clock_never_goes_back() -> None:
    assert monotonic() <= monotonic()


def test_ids_are_new_each_time_and_tell_what_they_name() -> None:
    assert len({new_request_id() for _ in range(100)}) == 100
    assert new_request_id().startswith("req-") and new_worker_id("decode").startswith("decode-")


def test_errors_tell_the_caller_what_to_do() -> None:
    assert InvalidRequest("No.", "top_p").param == "top_p"
    assert Overloaded("Later.", retry_after_s=3).retry_after_s == 3
    assert isinstance(ModelNotFound("No such model.", "model"), InvalidRequest)


def test_errors_cross_processes() -> None:
    error: BatonError = pickle.loads(pickle.dumps(Overloaded("Later.", 2.0)))
    assert str(error) == "Later."
