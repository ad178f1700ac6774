"""Blocks in lower tiers that peers ask for: brought up once for all of them, then held."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from baton.errors import Unavailable
from baton.ids import BlockHash, BlockId
from engine.interface import Held
from engine.worker.block_source import CachedBlocks


def names(*numbers: int) -> list[BlockHash]:
    return [BlockHash(bytes([number]) * 16) for number in numbers]


class FakeEngine:
    """Of blocks 0 to 9 some lie in HBM, the others below; what is promoted is there when the test says so."""

    def __init__(self, *in_hbm: int) -> None:
        self.in_hbm = set(names(*in_hbm))
        self.has_room = True
        self.promotions: list[tuple[list[BlockHash], Callable[[], None]]] = []
        self.held = 0

    def promote(self, wanted: Sequence[BlockHash], on_done: Callable[[], None]) -> bool:
        below = [name for name in wanted if name not in self.in_hbm]
        if below and self.has_room:
            self.promotions.append((below, on_done))
        return bool(below) and self.has_room

    def hold(self, wanted: Sequence[BlockHash]) -> Held:
        self.held += 1
        count = next((i for i, name in enumerate(wanted) if name not in self.in_hbm), len(wanted))
        return Held(tuple(map(BlockId, range(count))), (0,) * count)

    def let_go(self, held: Held) -> None:
        del held
        self.held -= 1

    def arrive(self, number: int = 0, *, well: bool = True) -> None:
        """A promotion is over."""
        below, on_done = self.promotions[number]
        self.in_hbm.update(below if well else below[:1])
        on_done()


class FakeThread:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine: FakeEngine | None = engine
        self.answers = asyncio.Event()
        self.answers.set()

    async def call(self, command: Callable[[Any], Any]) -> Any:
        if self.engine is None:
            raise Unavailable("gone")
        outcome = command(self.engine)
        await self.answers.wait()
        return outcome

    def post(self, command: Callable[[Any], Any]) -> None:
        command(self.engine)


class Rig:
    def __init__(self, *in_hbm: int) -> None:
        self.engine = FakeEngine(*in_hbm)
        self.thread = FakeThread(self.engine)
        self.cache: CachedBlocks[Any] = CachedBlocks(self.thread)  # type: ignore[arg-type]

    def ask(self, *numbers: int) -> "asyncio.Task[int]":
        """How many blocks were held."""

        async def hold() -> int:
            async with self.cache.hold(names(*numbers)) as held:
                return len(held.blocks)

        return asyncio.create_task(hold())

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)


def run(test: Callable[[Rig], Awaitable[None]], *in_hbm: int) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            rig = Rig(*in_hbm)
            await test(rig)
            assert rig.engine.held == 0 and not rig.cache._promoting

    asyncio.run(main())


def test_what_lies_below_is_brought_up_before_it_is_held() -> None:
    async def test(rig: Rig) -> None:
        asking = rig.ask(0, 1, 2)
        await rig.until(lambda: bool(rig.engine.promotions))
        assert not asking.done()
        rig.engine.arrive()
        assert await asking == 3

    run(test, 0)


def test_what_did_not_come_up_well_is_not_held() -> None:
    async def test(rig: Rig) -> None:
        asking = rig.ask(0, 1, 2, 3)
        await rig.until(lambda: bool(rig.engine.promotions))
        rig.engine.arrive(well=False)
        assert await asking == 2

    run(test, 0)


def test_where_all_lies_in_hbm_or_there_is_no_room_nothing_is_waited_for() -> None:
    async def test(rig: Rig) -> None:
        assert await rig.ask(0, 1) == 2
        rig.engine.has_room = False
        assert await rig.ask(0, 1, 2) == 2
        assert not rig.engine.promotions

    run(test, 0, 1)


def test_several_who_ask_for_the_same_share_one_promotion() -> None:
    async def test(rig: Rig) -> None:
        first = rig.ask(0, 1, 2)
        await rig.until(lambda: bool(rig.engine.promotions))
        others = [rig.ask(1, 2), rig.ask(0, 1, 2)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(rig.engine.promotions) == 1
        rig.engine.arrive()
        assert [await asking for asking in (first, *others)] == [3, 2, 3]
        assert len(rig.engine.promotions) == 1

    run(test)


def test_who_asks_for_more_has_the_rest_brought_up_afterwards() -> None:
    async def test(rig: Rig) -> None:
        first = rig.ask(0, 1)
        await rig.until(lambda: bool(rig.engine.promotions))
        second = rig.ask(0, 1, 2)
        rig.engine.arrive()
        assert await first == 2
        await rig.until(lambda: len(rig.engine.promotions) == 2)
        assert rig.engine.promotions[1][0] == names(2)
        rig.engine.arrive(1)
        assert await second == 3

    run(test)


def test_one_that_is_cancelled_meanwhile_does_not_keep_the_others_from_it() -> None:
    async def test(rig: Rig) -> None:
        first, second = rig.ask(0, 1), rig.ask(0, 1)
        await rig.until(lambda: bool(rig.engine.promotions))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert first.cancelled() and not second.done()
        rig.engine.arrive()
        assert await second == 2

    run(test)


@pytest.mark.parametrize("in_hbm", [(0, 1), ()])
def test_one_that_is_cancelled_while_the_engine_is_asked_holds_nothing(in_hbm: tuple[int, ...]) -> None:
    async def test(rig: Rig) -> None:
        rig.thread.answers.clear()
        asking = rig.ask(0, 1)
        await rig.until(lambda: bool(rig.engine.held or rig.engine.promotions))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        rig.thread.answers.set()
        if rig.engine.promotions:
            rig.engine.arrive()
        await rig.until(lambda: not rig.engine.held and not rig.cache._promoting)

    run(test, *in_hbm)


def test_an_engine_that_is_gone_leaves_nobody_waiting() -> None:
    async def test(rig: Rig) -> None:
        rig.thread.engine = None
        for _ in range(2):
            with pytest.raises(Unavailable):
                await rig.ask(0)
        await rig.until(lambda: not rig.cache._promoting)

    run(test)
