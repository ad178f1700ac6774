"""How fast blocks come up by themselves."""

from pathlib import Path

from baton.layout import KVLayout
from bench.models import Shape
from bench.restore import measure_restores
from bench.tiers.figures import Rate


def restore_rates(shape: Shape, directory: Path, size_bytes: int, compression: str) -> list[Rate]:
    layout = KVLayout(shape.layers, 300, 32, shape.kv_heads, shape.hidden // shape.heads, shape.dtype)
    speeds = measure_restores(layout, size_bytes // layout.block_bytes, directory, compression, 3)
    return [Rate(s.source, s.gb_per_s) for s in speeds]
