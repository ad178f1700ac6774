"""Keeps KV blocks that left the pool in host memory and on disk, and brings them back."""
