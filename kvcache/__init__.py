"""Names KV blocks by their content, hands them out, keeps them in tiers, and finds the prefixes that are there."""
