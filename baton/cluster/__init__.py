"""Membership with leases over Redis, and the embedded redis-server."""
