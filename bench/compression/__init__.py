"""Measures what keeping KV in int8 below HBM costs and gives: `python -m bench.compression`."""
