"""Inputs for a model that nobody has fed yet, as its signature and config suggest them; one file per modality."""

from .choose import supposed_batches, supposed_pictures
from .targets import TARGETS, targets_of

__all__ = ["TARGETS", "supposed_batches", "supposed_pictures", "targets_of"]
