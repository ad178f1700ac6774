"""The HTTP door: OpenAI-compatible, and what operators look at."""
