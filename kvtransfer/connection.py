"""What every transport's connection does alike: checks, times, counts, and ends once and for all."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from baton.clock import Clock, monotonic
from baton.errors import TransferError
from baton.ids import BlockId
from baton.layout import KVLayout
from kvtransfer.interface import Source
from kvtransfer.metrics import TransferMetrics

CLOSED = "The connection is closed."


class MeasuredConnection(ABC):
    """Implements kvtransfer.interface.Connection over four hooks."""

    transport: str

    def __init__(self, source: Source, target: KVLayout, metrics: TransferMetrics, clock: Clock = monotonic) -> None:
        self.bytes_written = 0
        self.busy_s = 0.0
        self._source, self._target = source, target
        self._metrics, self._clock = metrics, clock
        self._broken: str | None = None
        """Why nothing but `close` may follow; a sentence."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_released = False
        metrics.connected(self.transport, "out")

    def read_from(self, source: Source) -> None:
        assert self._idle.is_set()
        self._source = source

    async def write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        assert len(source) == len(target) and 0 <= layer < self._target.layers
        assert self._source.layout.block_tokens == self._target.block_tokens, "the source is in blocks of another size"
        if not source:
            return
        size_bytes = 2 * len(source) * self._target.slice_bytes
        started_s = self._clock()
        with self._operation():
            await self._write(layer, source, target)
        self.bytes_written += size_bytes
        self._metrics.moved(self.transport, "out", size_bytes, self._clock() - started_s)

    async def fence(self) -> None:
        started_s = self._clock()
        with self._operation():
            await self._fence()
        self._metrics.waited(self.transport, "out", self._clock() - started_s)

    async def close(self) -> None:
        if not self._idle.is_set():
            self._interrupt()
        self._broken = self._broken or CLOSED
        await self._idle.wait()
        if not self._is_released:
            self._is_released = True
            self._release()

    @contextmanager
    def _operation(self) -> Iterator[None]:
        if self._broken is not None:
            raise TransferError(self._broken)
        assert self._idle.is_set(), "a connection is used by one task at a time"
        self._idle.clear()
        started_s = self._clock()
        try:
            yield
        except TransferError as error:
            self._broken = str(error)
            self._metrics.failed(self.transport, "out")
            raise
        except BaseException:  # a cancellation, or a bug: where it stopped is not known
            self._broken = "The connection was interrupted."
            raise
        finally:
            self.busy_s += self._clock() - started_s
            self._idle.set()

    @abstractmethod
    async def _write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None: ...

    @abstractmethod
    async def _fence(self) -> None: ...

    @abstractmethod
    def _interrupt(self) -> None:
        """Makes the write or fence under way end soon."""

    @abstractmethod
    def _release(self) -> None:
        """Gives back what the connection holds; called once, when nothing is under way."""
