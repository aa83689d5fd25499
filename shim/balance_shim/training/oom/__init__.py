"""Explain an out-of-memory error: the scene, its causes, and what would have fitted."""
