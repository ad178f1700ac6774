"""Prices every placement in seconds, chooses, and says why."""
