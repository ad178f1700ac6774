"""The ground floor: ids, settings, clock, errors, metrics, rpc, membership and the Python client."""
