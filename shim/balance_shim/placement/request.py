"""A request for a plan: the model, its workload, and the devices that may be used."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache import digest, folder_of
from ..device_rules.kinds import INSISTS_ON_GROUPS, Architecture
from ..devices import Device
from ..memory.colocation import NO_CONSTRAINTS, Constraints
from ..memory.fingerprint import fingerprint
from ..memory.workload import Workload
from ..settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..memory.profile import ParameterBytes


@dataclass(frozen=True)
class Request:
    """What is to be placed.

    Attributes:
        model: on the meta device, quantizer-prepared.
        workload: what to plan for.
        devices: those that may be used.
        no_split: class names of modules that must stay whole; None: what the model declares.
        parameter_bytes: (name, parameter) -> bytes as it will be loaded; None: as it stands.
        trains: (name, parameter) -> whether it gets a gradient; None: what `workload.tuning` supposes.
        batch: what the model gets in training; None: what its config suggests.
        evaluation_batch: what the model gets when it is evaluated; None: rows like those of `batch`.
        cache: folder of what has been found out before; None: nothing is kept.
        constraints: the blocks that steps have shown to need one device; see `colocations`.
        head_device: index of the device where the head should be, if that fits; see `compared_heads`. No key has it:
            it changes which map is chosen, and neither costs nor trials.
        selective: whether layers are recomputed only as far as it takes to fit, whatever `workload` says.
        may_chunk: whether the loss is computed from full logits for no other reason than that the user says so.
        may_halve: whether `BALANCE_PRECISION=bf16` is a remedy: the devices compute in it, and nobody has set another.
        loss_on_first: whether the model computes its loss where its inputs arrive; see `upstream/loss_device.py`.
        repeats_grouped_keys: whether keys and values are repeated where that saves the S x S matrices of attention, as
            the shim does for models that it places; see `virtual/grouped_attention.py`.
    """

    model: "nn.Module"
    workload: Workload
    devices: tuple[Device, ...] = ()
    no_split: Collection[str] | None = None
    parameter_bytes: "ParameterBytes | None" = None
    trains: "Callable[[str, Tensor], bool] | None" = None
    batch: "Mapping[str, Any] | None" = None
    loss_on_first: bool = False
    selective: bool = False
    may_chunk: bool = False
    may_halve: bool = False
    cache: Path | None = None
    repeats_grouped_keys: bool = True
    constraints: Constraints = NO_CONSTRAINTS
    evaluation_batch: "Mapping[str, Any] | None" = None
    head_device: int | None = None

    @classmethod
    def from_settings(
        cls, settings: Settings, model: "nn.Module", workload: Workload, devices: tuple[Device, ...], **fields: Any
    ) -> "Request":
        """Return the request for `model` with what the user's settings decide; `fields` are the others."""
        return cls(
            model,
            workload,
            devices,
            selective=fields.pop("selective", settings.gradient_checkpointing == "auto"),
            may_chunk=settings.loss == "full",
            cache=folder_of(settings.cache),
            **fields,
        )

    @property
    def architectures(self) -> tuple[Architecture, ...]:
        """The architectures of the devices, each once: which kernels run depends on them."""
        return tuple(sorted({device.architecture for device in self.devices}, key=str))

    def key(self, *what: Any) -> str:
        """Return the key of a result that follows from `what` and this request, but for the sizes of its devices."""
        return "" if self.cache is None else digest(self._identity, *what)

    @cached_property
    def _identity(self) -> list[Any]:
        from ..device_rules.attention import EnabledKernels

        sizes = self.parameter_bytes
        weights = sizes and [sizes(name, each) for name, each in self.model.named_parameters(remove_duplicate=False)]
        return [
            fingerprint(self.model, self.trains, self.batch),
            self.workload.to_json(),
            sorted(self.no_split or ()),
            weights,
            self.loss_on_first,
            [self.repeats_grouped_keys, *self.architectures, *EnabledKernels.now(), os.environ.get(INSISTS_ON_GROUPS)],
        ]
