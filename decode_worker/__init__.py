"""Reserves blocks, takes them in, batches decode steps and streams tokens."""
