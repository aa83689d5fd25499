"""Facts about the installed transformers: config, classes, dtype, and the device that computes the loss."""
