"""A request for a plan: a training case, the devices that may be used, and options."""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache import digest, folder_of
from ..device import Device
from ..device_rules.kinds import INSISTS_ON_GROUPS, Architecture
from ..memory.colocation import NO_CONSTRAINTS, Constraints
from ..memory.fingerprint import fingerprint
from ..memory.training_case import TrainingCase
from ..memory.workload import Workload
from ..settings import Settings

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Request:
    """A training to place on devices.

    Attributes:
        case: the model and its training.
        devices: those that may be used.
        cache: folder of earlier results; None: no results are stored.
        constraints: the blocks that steps have shown to need one device; see `colocations`.
        head_device: index of the device where the head should be, if that fits; see `compared_heads`. It is part of no
            key: it changes which map is chosen, and neither costs nor dry runs.
        selective: whether as few layers are recomputed as it takes to fit, whatever `workload` has.
        may_chunk: whether only the user's setting has the loss computed from full logits, so chunks are a remedy.
        may_halve: whether `BALANCE_PRECISION=bf16` is a remedy: the devices compute in it, and nothing else is set.
        repeats_grouped_keys: whether keys and values are repeated where that saves the S x S matrices of attention, as
            the shim does for models that it places; see `virtual/grouped_attention.py`.
    """

    case: TrainingCase
    devices: tuple[Device, ...] = ()
    cache: Path | None = None
    constraints: Constraints = NO_CONSTRAINTS
    head_device: int | None = None
    selective: bool = False
    may_chunk: bool = False
    may_halve: bool = False
    repeats_grouped_keys: bool = True

    @classmethod
    def from_settings(
        cls, settings: Settings, case: TrainingCase, devices: tuple[Device, ...], **fields: Any
    ) -> "Request":
        """Return the request for `case` with the options that the user's settings decide; `fields` are the rest."""
        return cls(
            case,
            devices,
            selective=fields.pop("selective", settings.gradient_checkpointing == "auto"),
            may_chunk=settings.loss == "full",
            cache=folder_of(settings.cache),
            **fields,
        )

    @property
    def model(self) -> "nn.Module":
        return self.case.model

    @property
    def workload(self) -> Workload:
        return self.case.workload

    def with_case(self, **changes: Any) -> "Request":
        """Return the request with these fields of its case changed."""
        return replace(self, case=replace(self.case, **changes))

    def with_workload(self, **changes: Any) -> "Request":
        """Return the request with these fields of its workload changed."""
        return replace(self, case=self.case.with_workload(**changes))

    def in_training(self) -> "Request":
        """Return the request without evaluations."""
        return replace(self, case=self.case.in_training())

    @property
    def architectures(self) -> tuple[Architecture, ...]:
        """The architectures of the devices, each once: which kernels run depends on them."""
        return tuple(sorted({device.architecture for device in self.devices}, key=str))

    def key(self, *parts: Any) -> str:
        """Return the key of a result that follows from `parts` and this request, but for the sizes of its devices."""
        return "" if self.cache is None else digest(self._identity, *parts)

    @cached_property
    def _identity(self) -> list[Any]:
        from ..device_rules.attention import EnabledKernels

        case = self.case
        sizes = case.parameter_bytes
        parameters = case.model.named_parameters(remove_duplicate=False) if sizes else ()
        return [
            fingerprint(case),
            case.workload.traced().to_json(),
            sorted(case.structure.layers),
            sizes and [sizes(name, parameter) for name, parameter in parameters],
            case.loss_on_first,
            [self.repeats_grouped_keys, *self.architectures, *EnabledKernels.now(), os.environ.get(INSISTS_ON_GROUPS)],
        ]
