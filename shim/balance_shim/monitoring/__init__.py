"""Memory during training: the usage of each device per step, the cause of growth, and out-of-memory errors."""
