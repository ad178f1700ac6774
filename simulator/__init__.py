"""Replays traces through the real router, schedulers and tiers in virtual time."""
