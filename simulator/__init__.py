"""Replays traces through the real router and schedulers in virtual time."""
