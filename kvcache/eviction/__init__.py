"""Decides which blocks a tier keeps: by the milliseconds that each may save."""
