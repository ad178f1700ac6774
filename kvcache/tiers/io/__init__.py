"""Copies between pool, host memory and disk, by threads that know nothing of the index."""
