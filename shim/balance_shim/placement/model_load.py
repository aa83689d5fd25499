"""Models that are about to load: the script's arguments of `from_pretrained`, and the inputs of a device map."""

from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from ..upstream.weight_sizes import ParameterBytes


@dataclass(frozen=True)
class ModelLoad:
    """A model that is about to get a device map, whatever this version of transformers calls the moment.

    Attributes:
        model: on the meta device, quantizer-prepared.
        device_map: the script's argument, such as "auto".
        max_memory: the script's, as in accelerate.
        no_split: class names of modules that must not be split; None: those that the model declares.
        parameter_bytes: (name, parameter) -> bytes as it will be loaded; None: as it stands.
    """

    model: "nn.Module"
    device_map: str
    max_memory: Any
    no_split: Any
    parameter_bytes: "ParameterBytes | None"


class Call(NamedTuple):
    """A call of `from_pretrained`.

    Attributes:
        device_map, max_memory: as they reach the library.
        dtype: in which weights would load without BALANCE_PRECISION; None where unset.
        mapped: whether the script itself gives a device map.
    """

    device_map: Any
    max_memory: Any
    dtype: Any
    mapped: bool = True


class Calls(local):
    """The calls of `from_pretrained` under way in this thread, outermost first."""

    def __init__(self) -> None:
        self.stack: list[Call] = []

    def innermost(self) -> Call | None:
        """Return the call under way; None outside of any."""
        return self.stack[-1] if self.stack else None


calls = Calls()
