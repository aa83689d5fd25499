"""Tensors on devices that are not there: what the simulation and the memory model run a model on.

A virtual tensor says that it lives on some device, holds a CPU tensor or only a shape, and its bytes are counted.
"""
