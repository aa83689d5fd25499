"""Data-parallel replicas of a model, each on its own share of the devices of this machine."""
