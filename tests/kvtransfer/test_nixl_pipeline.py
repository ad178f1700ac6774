"""When which read begins and who hears of its end, on an agent that does as it is told."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from baton.clock import ManualClock
from baton.errors import TransferError
from baton.layout import KVLayout
from kvtransfer.nixl.agent import Peer, Source
from kvtransfer.nixl.pace import ATTENDING_SLEEP_S, IDLE_SLEEP_S, SLEEP_S, SPIN_S, STALLED_S, STALLED_SLEEP_S, Pace
from kvtransfer.nixl.peers import Peers
from kvtransfer.nixl.pipeline import Pipeline, Read, Unwanted
from kvtransfer.nixl.segment import HOST, Segment

LAYOUT = KVLayout(layers=1, blocks=4, block_tokens=4, kv_heads=2, head_dim=8, dtype="float32")
PEER = Peer(Source(LAYOUT, Segment(HOST, 4096, LAYOUT.region_bytes, 0), "peer", b"metadata"), None)
NONE = np.array([], np.int32)


class FakeAgent:
    """Reads end when they are told to; which one is which, its local index says."""

    def __init__(self) -> None:
        self.posted: list[int] = []
        self.done: set[int] = set()
        self.failing: set[int] = set()
        self.refusing: set[int] = set()

    def post(self, peer: Peer, local: NDArray[np.int32], remote: NDArray[np.int32]) -> int:
        del peer, remote
        (number,) = map(int, local)
        if number in self.refusing:
            raise TransferError("gone")
        self.posted.append(number)
        return number

    def is_done(self, handle: Any) -> bool:
        if handle in self.failing:
            raise TransferError("broken")
        return handle in self.done


def read(number: int, size_bytes: int = 10, is_wanted: Callable[[], bool] = lambda: True) -> Read:
    future: Any = None
    return Read(PEER, np.array([number], np.int32), NONE, size_bytes, is_wanted, future)


def numbers(pipeline: Pipeline) -> list[tuple[int, type[Exception] | None]]:
    return [(int(end.read.local[0]), type(end.error) if end.error else None) for end in pipeline.advance()]


def test_reads_begin_in_order_up_to_the_bound_and_end_in_any() -> None:
    agent = FakeAgent()
    pipeline = Pipeline(agent, bytes_max=25)
    for number in range(4):
        pipeline.add(read(number))
    assert numbers(pipeline) == []
    assert agent.posted == [0, 1]
    agent.done = {1}
    assert numbers(pipeline) == [(1, None)]
    assert numbers(pipeline) == []
    assert agent.posted == [0, 1, 2]
    agent.done = {0, 1, 2, 3}
    assert numbers(pipeline) == [(0, None), (2, None)]
    assert numbers(pipeline) == [(3, None)]
    assert not pipeline.is_busy


def test_a_read_larger_than_the_bound_goes_alone() -> None:
    agent = FakeAgent()
    pipeline = Pipeline(agent, bytes_max=25)
    pipeline.add(read(0, size_bytes=1000))
    pipeline.add(read(1))
    assert numbers(pipeline) == []
    assert agent.posted == [0]


def test_an_end_is_told_before_the_next_begins() -> None:
    """As on one machine, where each read is done as soon as it is posted."""
    agent = FakeAgent()
    agent.done = {0, 1}
    pipeline = Pipeline(agent)
    pipeline.add(read(0))
    pipeline.add(read(1))
    assert numbers(pipeline) == [(0, None)]
    assert agent.posted == [0]
    assert numbers(pipeline) == [(1, None)]


def test_what_nobody_wants_any_more_is_never_begun() -> None:
    agent = FakeAgent()
    pipeline = Pipeline(agent)
    pipeline.add(read(0, is_wanted=lambda: False))
    assert numbers(pipeline) == [(0, Unwanted)]
    assert agent.posted == []


def test_failures_end_the_read_and_only_it() -> None:
    agent = FakeAgent()
    agent.refusing, agent.failing = {0}, {1}
    pipeline = Pipeline(agent)
    for number in range(3):
        pipeline.add(read(number))
    assert numbers(pipeline) == [(0, TransferError)]
    assert numbers(pipeline) == [(1, TransferError)]
    assert numbers(pipeline) == []
    agent.done = {2}
    assert numbers(pipeline) == [(2, None)]


def test_giving_up_tells_all_that_are_left() -> None:
    agent = FakeAgent()
    pipeline = Pipeline(agent, bytes_max=10)
    pipeline.add(read(0))
    pipeline.add(read(1))
    pipeline.advance()
    assert {int(end.read.local[0]) for end in pipeline.give_up()} == {0, 1}
    assert not pipeline.is_busy


@given(st.data())
def test_every_read_ends_once_and_never_too_many_bytes_are_under_way(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), max_size=12))
    agent = FakeAgent()
    pipeline = Pipeline(agent, bytes_max=50)
    ended: list[int] = []
    for number, size_bytes in enumerate(sizes):
        wanted = data.draw(st.booleans())
        pipeline.add(read(number, size_bytes, lambda wanted=wanted: wanted))  # type: ignore[misc]
    for _ in range(4 * len(sizes)):
        under_way = [number for number in agent.posted if number not in ended]
        assert sum(sizes[number] for number in under_way) <= 50
        if under_way:
            agent.done.add(data.draw(st.sampled_from(under_way)))
        ended += [number for number, _ in numbers(pipeline)]
    assert sorted(ended) == list(range(len(sizes)))


def test_it_spins_then_sleeps_and_without_work_it_hardly_wakes() -> None:
    clock = ManualClock()
    pace = Pace(clock)
    assert pace.sleep_s(is_reading=False, is_attending=False) == IDLE_SLEEP_S
    assert pace.sleep_s(is_reading=True, is_attending=False) == 0
    assert pace.sleep_s(is_reading=False, is_attending=True) == SLEEP_S
    clock.advance(2 * SPIN_S)
    assert pace.sleep_s(is_reading=True, is_attending=True) == SLEEP_S
    clock.advance(1.0)
    assert pace.sleep_s(is_reading=False, is_attending=True) == ATTENDING_SLEEP_S
    clock.advance(STALLED_S)
    assert pace.sleep_s(is_reading=True, is_attending=False) == STALLED_SLEEP_S
    pace.happened()
    assert pace.sleep_s(is_reading=True, is_attending=False) == 0


def test_peers_are_added_once_and_a_broken_one_anew_when_its_last_user_has_gone() -> None:
    class FakeDriver:
        def __init__(self) -> None:
            self.added: list[Peer] = []
            self.submitted = 0

        async def call(self, work: Any) -> Peer:
            del work
            self.added.append(Peer(PEER.source, None))
            return self.added[-1]

        def submit(self, work: Any) -> None:
            del work
            self.submitted += 1

    async def scenario() -> None:
        driver: Any = FakeDriver()
        peers = Peers(driver)
        first, second = await asyncio.gather(peers.acquire(PEER.source), peers.acquire(PEER.source))
        assert first is second
        with pytest.raises(TransferError, match="not what it said"):
            await peers.acquire(Source(LAYOUT, Segment(HOST, 8192, LAYOUT.region_bytes, 0), "peer", b"metadata"))
        first.is_broken = True
        peers.release(first)
        with pytest.raises(TransferError, match="broken"):
            await peers.acquire(PEER.source)
        assert driver.submitted == 0
        peers.release(first)
        assert (driver.submitted, len(peers)) == (1, 0)
        assert await peers.acquire(PEER.source) is not first
        peers.close()

    asyncio.run(scenario())
