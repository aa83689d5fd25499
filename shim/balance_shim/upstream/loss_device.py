"""The device on which a model computes its own loss: that of the head, or that of the inputs."""

import inspect
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# What model code looks like that takes the labels to the logits: the library's common loss functions do it inside, and
# older or remote code says `shift_labels = shift_labels.to(shift_logits.device)`, or `labels[:, 1:].to(logits.device)`.
_FOLLOWS_LOGITS = re.compile(r"\bloss_function\(|\w*labels\w*(?:\[[^\]\n]*\])?\.to\(")


def computes_loss_on_first_device(model: "nn.Module") -> bool:
    """Return whether the head of `model` must be on the first device for its loss to be computed.

    Encoders such as BERT hand labels, which arrive on the first device, and logits, which are on the head's, to the
    loss as they are. The only sign is the source of `forward`; where there is none to read, the careful answer is
    given.
    """
    forward = inspect.unwrap(type(model).forward)
    try:
        takes_labels = "labels" in inspect.signature(forward).parameters
        return takes_labels and not _FOLLOWS_LOGITS.search(inspect.getsource(forward))
    except (OSError, TypeError, ValueError):
        return True
