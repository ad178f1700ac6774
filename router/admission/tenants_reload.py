"""The tenants' file, read again when it changes."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from baton.errors import SettingsError
from router.admission.tenants import Tenants

log = logging.getLogger(__name__)

RELOAD_S = 5.0
"""Between two looks: a mounted secret changes without telling anybody."""


class TenantsReload:
    """Keeps `tenants` as the file says; while that cannot be used, as it said before, and tells so."""

    def __init__(
        self, path: Path, tenants: Tenants, tell_unusable: Callable[[bool], None], period_s: float = RELOAD_S
    ) -> None:
        self._path, self._tenants, self._tell_unusable, self._period_s = path, tenants, tell_unusable, period_s
        self._seen: list[tuple[int, int, int]] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="follow the tenants' file")

    async def close(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Reads the file if it, or a key's, has changed since the last look."""
        keys = [path for tenant in self._tenants.by_name.values() for path in tenant.api_key_files]
        found = await asyncio.to_thread(versions, [self._path, *keys])
        if found == self._seen:
            return
        self._seen = found  # of before it is read: what changes meanwhile is seen by the next look
        try:
            self._tenants.replace(await asyncio.to_thread(Tenants.load, self._path))
        except SettingsError as error:
            log.error("%s What it said before goes on.", error)
            self._tell_unusable(True)
        else:
            log.info("the tenants' file was read: %d tenants", len(self._tenants.by_name))
            self._tell_unusable(False)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self.look()


def versions(paths: Iterable[Path]) -> list[tuple[int, int, int]]:
    """What differs when a file's content does, links followed; of one that is not there: zeros."""
    return [_version(path) for path in paths]


def _version(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_mtime_ns, status.st_ino, status.st_size
