import asyncio

import pytest

from baton.cluster.lease import Lease
from baton.cluster.redis_writer import RedisWriter

FAST = Lease(retry_max_s=0.01)


class Script:
    """A `write` that fails, has more, or is done, as told; then is done."""

    def __init__(self, *outcomes: Exception | bool) -> None:
        self.outcomes = list(outcomes)
        self.writes = 0
        self.written = asyncio.Condition()

    async def write(self) -> bool:
        async with self.written:
            self.writes += 1
            self.written.notify_all()
        outcome = self.outcomes.pop(0) if self.outcomes else False
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def reaches(self, writes: int) -> None:
        async with asyncio.timeout(30), self.written:
            await self.written.wait_for(lambda: self.writes >= writes)


def test_it_writes_when_woken_and_until_nothing_waits() -> None:
    async def main() -> None:
        script = Script(True, True, False)
        writer = RedisWriter(script.write, FAST, "Writing")
        writer.start()
        await asyncio.sleep(0)
        assert script.writes == 0
        writer.wake()
        await script.reaches(3)
        await asyncio.sleep(0)
        writer.wake()
        await script.reaches(4)
        await writer.close()
        await writer.close()
        assert script.writes == 4

    asyncio.run(main())


def test_it_writes_at_each_heartbeat_too() -> None:
    async def main() -> None:
        script = Script()
        writer = RedisWriter(script.write, FAST, "Writing")
        writer.start(heartbeat_s=0.01)
        await script.reaches(3)
        await writer.close()

    asyncio.run(main())


def test_what_failed_is_tried_again_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        script = Script(ConnectionError("away"), ConnectionError("away"), False)
        writer = RedisWriter(script.write, FAST, "Writing things")
        writer.start()
        writer.wake()
        await script.reaches(3)
        await asyncio.sleep(0)
        await writer.close()
        assert script.writes == 3

    asyncio.run(main())
    assert caplog.messages == [
        "Writing things in Redis fails (away); trying on",
        "Writing things in Redis works again after 2 tries",
    ]


def test_a_writer_that_never_started_may_be_closed() -> None:
    asyncio.run(RedisWriter(Script().write, FAST, "Writing").close())
