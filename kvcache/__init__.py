"""Names KV blocks by their content, hands them out, and finds the prefixes that are already there."""
