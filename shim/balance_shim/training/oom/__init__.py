"""Explain an out-of-memory error: the scene, its causes, and the remedies that would have fitted."""
