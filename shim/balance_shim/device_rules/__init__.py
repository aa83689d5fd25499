"""Differences between kinds of devices, as data: memory, compute capability, overhead, attention kernels, autocast.

Importing this package, `kinds` and `overhead` needs the standard library only: `kinds` is read while arming.
"""
