"""The cluster's list, in Redis, of who holds which block in which tier."""
