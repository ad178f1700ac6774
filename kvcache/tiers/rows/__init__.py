"""Blocks as rows of host memory: where they lie, how they are packed, and their way from and to the pool."""
