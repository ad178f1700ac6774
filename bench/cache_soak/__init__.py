"""A long load whose KV is ten times what HBM holds, over three tiers: `python -m bench.cache_soak`."""
