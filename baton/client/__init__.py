"""The Python client: gRPC calls as plain functions."""

from baton.client.client import Cache, Client, Part

__all__ = ["Cache", "Client", "Part"]
