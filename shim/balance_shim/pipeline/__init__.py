"""`BALANCE_PIPELINE`: micro-batches in flight on a device map, and transfers between its devices that do not block."""
