"""Knows which worker holds which KV blocks, from their events, and how fresh that is."""
