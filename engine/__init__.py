"""Runs the model: loading, paged attention, batch steps, sampling."""
