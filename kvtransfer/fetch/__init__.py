"""Reads named KV blocks out of another worker's cache."""
