"""Measures what a cached prompt saves, by the tier that it lies in: `python -m bench.tiers`."""
