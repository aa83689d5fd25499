"""Activations and temporaries of a model, from a forward and backward pass of its own code on virtual tensors."""
