"""Tenants as a router has them: from their file, and held to their limits together with the other routers."""

import secrets
from collections.abc import Mapping

from redis.asyncio import Redis

from baton.clock import Clock, monotonic
from baton.cluster.served_tokens import Share
from baton.settings import RouterSettings
from router.admission.admission import Admission
from router.admission.metrics import AdmissionMetrics
from router.admission.shared_limits import SharedLimits
from router.admission.tenant_limits import NoLimits, TenantLimits
from router.admission.tenants import Tenants
from router.admission.tenants_reload import TenantsReload


class Tenancy:
    """`tenants` is for the doors, `limits` for the Admission. The client stays the caller's.

    Without a tenants' file everybody is one tenant without limits, and Redis is not needed.
    """

    def __init__(
        self,
        settings: RouterSettings,
        redis: Redis | None,
        router_id: str,
        metrics: AdmissionMetrics,
        clock: Clock = monotonic,
    ) -> None:
        """Raises SettingsError if the tenants' file cannot be used."""
        self.tenants = Tenants.open()
        self.limits: TenantLimits = NoLimits()
        self._shared: SharedLimits | None = None
        self._reload: TenantsReload | None = None
        if settings.tenants_file is not None:
            assert redis is not None, "tenants are held to their limits through Redis"
            self.tenants = Tenants.load(settings.tenants_file)
            self._reload = TenantsReload(settings.tenants_file, self.tenants, metrics.tenants_file_unusable.set)
            epoch = secrets.token_hex(8)
            self.limits = self._shared = SharedLimits(
                redis, settings.key_prefix, router_id, epoch, metrics.bucket_fallback.set, clock
            )

    async def start(self, admission: Admission) -> None:
        """Raises ClusterError if Redis does not answer; `close` is then still due."""
        if self._shared is None or self._reload is None:
            return

        def tell(served: Mapping[Share, int]) -> None:
            weights = {tenant.name: tenant.weight for tenant in self.tenants.by_name.values()}
            admission.served_elsewhere(served, weights)

        self._reload.start()
        await self._shared.start(admission.served_tokens, lambda: admission.requests, tell)

    async def close(self) -> None:
        """Idempotent."""
        if self._reload is not None:
            await self._reload.close()
        if self._shared is not None:
            await self._shared.close()
