"""Tensors on devices that do not exist; the simulation and the memory model run models on them.

A virtual tensor reports a device of its own, holds a CPU tensor or only a shape, and its bytes are counted.
"""
