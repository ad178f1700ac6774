"""The Python client: gRPC calls as plain functions."""

from baton.client.client import Client, Part

__all__ = ["Client", "Part"]
