"""The Python client: gRPC calls as plain functions."""
