"""Moves KV blocks between workers, by shm, nixl, ucx or tcp, over links that were proven and tested."""
