"""One rank's passes are noted by hooks on its modules and parameters, and reduced to what ranks must agree on."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .flight_record import FlightRecord

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Observed:
    """The modules and parameters whose runs and gradients are noted.

    Attributes:
        modules: by name, those that have parameters of their own; modules that DeepSpeed gathers as a whole (its leaf
            modules) count as one.
        gathered: indices of those that make all ranks gather parameters whenever they run. The others have parameters
            so small that DeepSpeed keeps them on every rank after the first pass (`ds_persist`).
        parameters: by name, those that train, but for parameters of leaf modules, whose missing gradients DeepSpeed
            fills with zeros.
        sizes: number of values of each parameter.
        limit: values that are reduced together at most (`reduce_bucket_size`).
    """

    modules: Mapping[str, Any]
    gathered: frozenset[int]
    parameters: Mapping[str, Any]
    sizes: Sequence[int]
    limit: int


def noted(model: "nn.Module", limit: int) -> Observed:
    """Return the modules and parameters of `model`, which DeepSpeed has partitioned, that ranks note."""
    modules: dict[str, Any] = {}
    gathered: set[int] = set()
    leaves: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if leaves and name.startswith(leaves):
            continue
        is_leaf = bool(getattr(module, "_z3_leaf", False))
        if is_leaf:
            leaves = (*leaves, f"{name}.")
        own = [parameter for parameter in module.parameters(recurse=is_leaf) if hasattr(parameter, "ds_id")]
        if not own:
            continue
        if any(not getattr(parameter, "ds_persist", False) for parameter in own):
            gathered.add(len(modules))
        modules[name] = module
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and hasattr(parameter, "ds_id") and not (leaves and name.startswith(leaves))
    }
    sizes = [getattr(parameter, "ds_numel", 0) for parameter in parameters.values()]
    return Observed(modules, frozenset(gathered), parameters, sizes, limit)


def reached_in_backward(subject: Observed) -> list[str]:
    """Return the names that the backward pass reaches, in the order of their indices: parameters, then modules."""
    return [*subject.parameters, *subject.modules]


def note(notes: FlightRecord, subject: Observed) -> list[Any]:
    """Have `notes` taken of the passes of `subject`; return the hooks that do so.

    Ahead of DeepSpeed's own: a rank waits for the others, or is aborted, inside of those. For parameters that means a
    hook on the gradient, which runs before any that waits for the gradient to be accumulated.
    """
    hooks = [
        module.register_forward_pre_hook(lambda *_, index=index: notes.add(index), prepend=True)
        for index, module in enumerate(subject.modules.values())
    ]
    hooks += [
        parameter.register_hook(lambda _, index=index: notes.add_gradient(index))
        for index, parameter in enumerate(subject.parameters.values())
    ]
    return hooks


class BackwardHook:
    """FlightRecord each module whose parameters DeepSpeed is about to gather for its backward pass.

    In the place of the method that DeepSpeed calls for that (`parameter_offload.py`, 0.16 to 0.19), because a hook of
    torch's would be one more autograd function per module.
    """

    METHOD = "pre_sub_module_backward_function"

    def __init__(self, notes: FlightRecord, subject: Observed, optimizer: Any) -> None:
        """Args: optimizer: DeepSpeed's, of stage 3."""
        self._owner = getattr(optimizer, "parameter_offload", None)
        original = getattr(self._owner, self.METHOD, None)
        if original is None:
            self._owner = None
            return
        first = len(subject.parameters)
        indices = {id(module): first + place for place, module in enumerate(subject.modules.values())}

        def before_backward(module: Any) -> Any:
            index = indices.get(id(module))
            if index is not None:
                notes.add_gradient(index)
            return original(module)

        vars(self._owner)[self.METHOD] = before_backward

    def remove(self) -> None:
        """Take no more notes."""
        if self._owner is not None:
            vars(self._owner).pop(self.METHOD, None)


class Checksum:
    """A checksum of a pass that has ended, which must be the same on all ranks."""

    def __init__(self, subject: Observed) -> None:
        self._subject = subject
        self._latest: tuple[list[int], list[tuple[int, ...]]] = ([], [])

    def of(self, notes: FlightRecord) -> str:
        """Return the checksum of the present pass: the gathered modules in their order, and the buckets of gradients.

        Not the order of gradients, which is the same to DeepSpeed within a bucket.
        """
        count = len(self._subject.sizes)
        gradients = [index for index in notes.gradients if index < count]
        if gradients != self._latest[0]:
            self._latest = gradients, buckets(gradients, self._subject.sizes, self._subject.limit)
        modules = [index for index in notes.order if index in self._subject.gathered]
        return str(zlib.crc32(repr((modules, self._latest[1])).encode()))


def buckets(gradients: Sequence[int], sizes: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    """Return the gradients that DeepSpeed reduces together, in its order; ranks must agree on them.

    It collects gradients as they come, and reduces what it has before the one that would exceed `limit`; within a
    bucket it sorts them (`stage3.py`: `reduce_independent_p_g_buckets_and_remove_grads`, 0.16 to 0.19).

    Args:
        gradients: indices of parameters, as they got their gradients.
        sizes: number of values of each parameter.
        limit: values that are reduced together at most.
    """
    result: list[tuple[int, ...]] = []
    bucket: list[int] = []
    values = 0
    for index in gradients:
        if bucket and values + sizes[index] > limit:
            result.append(tuple(sorted(bucket)))
            bucket, values = [], 0
        bucket.append(index)
        values += sizes[index]
    return [*result, tuple(sorted(bucket))] if bucket else result
