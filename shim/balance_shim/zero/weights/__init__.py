"""Weights under ZeRO-3: loading, partitioning, gathering and saving."""
