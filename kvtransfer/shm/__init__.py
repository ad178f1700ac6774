"""Within one machine: the prefill worker maps the decode worker's region and writes slices straight into it."""
