"""A training to plan for: a model, its structure, the workload, the batch, and which parameters train."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..upstream.loss_device import computes_loss_on_first_device
from ..upstream.weight_sizes import ParameterBytes
from .structure import ModelStructure, structure_of
from .workload import Workload

if TYPE_CHECKING:
    from torch import Tensor, nn

Trains = Callable[[str, "Tensor"], bool]


@dataclass(frozen=True)
class TrainingCase:
    """One training of one model, on any devices.

    Attributes:
        model: as it stands, or on the meta device and prepared by its quantizer; never changed.
        workload: micro-batch, sequence length, optimizer and the like.
        structure: that of `model`.
        trains: (name, parameter) -> whether it gets a gradient. None: as `workload.tuning` implies; where it is given,
            adapters are parameters of the model already and none are assumed.
        batch: the inputs of a training step; None: derived from the config.
        evaluation_batch: the inputs of an evaluation step; None: sequences like those of `batch`.
        parameter_bytes: (name, parameter) -> bytes as it will be loaded; None: as it is now. Quantizers know better
            (see `upstream/weight_sizes.py`).
        loss_on_first: whether the model computes its loss where its inputs arrive; see `upstream/loss_device.py`.
    """

    model: "nn.Module"
    workload: Workload
    structure: ModelStructure
    trains: Trains | None = None
    batch: Mapping[str, Any] | None = None
    evaluation_batch: Mapping[str, Any] | None = None
    parameter_bytes: ParameterBytes | None = None
    loss_on_first: bool = False

    @classmethod
    def of(
        cls, model: "nn.Module", workload: Workload, no_split: Collection[str] | None = None, **fields: Any
    ) -> "TrainingCase":
        """Return the case of `model`, with the facts that follow from the model itself.

        Args:
            no_split: class names of modules that must stay whole; None: those that the model declares.
            fields: other attributes of the case.
        """
        fields.setdefault("loss_on_first", computes_loss_on_first_device(model))
        return cls(model, workload, structure_of(model, no_split), **fields)

    def in_training(self) -> "TrainingCase":
        """Return the case without evaluations."""
        return replace(self, workload=replace(self.workload, evaluation=None), evaluation_batch=None)

    def with_workload(self, **changes: Any) -> "TrainingCase":
        """Return the case with these fields of its workload changed."""
        return replace(self, workload=replace(self.workload, **changes))
