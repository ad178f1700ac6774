"""What the routers agree on about a tenant, as admission asks for it."""

from typing import Protocol

from router.admission.tenants import Tenant


class TenantLimits(Protocol):
    """What the routers agree on about a tenant."""

    async def take(self, tenant: Tenant, tokens: int) -> float:
        """0: they are taken from its rate; else nothing is, and they might be had after so many seconds."""

    def settle(self, tenant: Tenant, tokens: int) -> None:
        """It used so many more than were taken; fewer where negative."""

    def requests_elsewhere(self, tenant: Tenant) -> int:
        """In flight at the other routers."""


class NoLimits:
    """One router, no rates: what tests and a router without a tenants' file have."""

    async def take(self, tenant: Tenant, tokens: int) -> float:
        del tenant, tokens
        return 0.0

    def settle(self, tenant: Tenant, tokens: int) -> None:
        pass

    def requests_elsewhere(self, tenant: Tenant) -> int:
        del tenant
        return 0
