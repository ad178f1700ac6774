"""Takes prefill jobs and streams the KV blocks out while they are computed."""
