"""Weights under ZeRO-3: loaded, partitioned, seen whole by scripts, and saved."""
