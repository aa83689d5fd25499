"""The memory of training: the workload, the model as a chain of blocks, and the bytes of each block."""
