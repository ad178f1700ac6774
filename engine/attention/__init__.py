"""Attention over the paged pool: what every layer calls, the plan of a step, and the kernels."""
