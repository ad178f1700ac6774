"""A membership that a test writes."""

import asyncio
from collections.abc import Sequence

from baton.cluster.worker_info import WorkerInfo


class ListedMembership:
    """The members are a list; `change` tells whoever waits."""

    def __init__(self, workers: Sequence[WorkerInfo]) -> None:
        self._workers = list(workers)
        self._news = asyncio.Event()

    def workers(self) -> Sequence[WorkerInfo]:
        return self._workers

    async def changed(self) -> None:
        await self._news.wait()

    def change(self, workers: Sequence[WorkerInfo]) -> None:
        self._workers = list(workers)
        self._news.set()
        self._news = asyncio.Event()
