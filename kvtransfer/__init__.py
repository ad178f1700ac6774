"""Moves KV blocks between workers: inproc, shm and tcp behind one small protocol."""
