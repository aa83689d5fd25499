"""The state and the temporaries of each optimizer, by the names of `TrainingArguments(optim=...)`.

Sources: torch.optim (2.5 to 2.13), transformers.optimization.Adafactor, bitsandbytes.optim; the temporaries of the
torch optimizers are those of a step on traced tensors (`tests/test_optimizers.py` does it again).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .versions import version_of

if TYPE_CHECKING:
    from torch import Tensor

FLOAT32 = 4
# The Trainer asks bitsandbytes for that; 4.51 looks for a class that its own choices do not give, 4.53 does not.
SPARES_SINCE = (4, 53)
QUANTIZED = 1.03  # bytes of a value kept in 8 bits, its share of the scales of blocks of 256 included


@dataclass(frozen=True)
class Optimizer:
    """One optimizer's memory.

    Attributes:
        tensors: state tensors of the parameter's size.
        width: bytes of each value in them; None: as wide as the parameter's.
        step: temporary tensors of a step, each of the parameter's size.
        left: how many of them are still there when the next parameter has its turn.
        at_once: whether a step takes all parameters of a device together, so that temporaries add up.
        factored: whether the state is a row and a column for each matrix.
        widened: whether a step works in float32, and on copies of parameters and gradients that are not.
        spares_embeddings: whether the Trainer has the state of embeddings kept in float32.
    """

    tensors: int = 0
    width: float | None = None
    step: float = 0
    left: float = 0
    at_once: bool = False
    factored: bool = False
    widened: bool = False
    spares_embeddings: bool = False

    def state_bytes(self, parameters: "Iterable[Tensor]") -> int:
        """Return the bytes kept between steps for `parameters`."""
        if self.factored:
            return sum(
                FLOAT32 * (parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2])
                if parameter.dim() > 1
                else FLOAT32 * parameter.numel()
                for parameter in parameters
            )
        return int(
            sum(parameter.numel() * self.tensors * (self.width or parameter.element_size()) for parameter in parameters)
        )

    def state_tensors(self, parameters: "Iterable[Tensor]") -> tuple[int, ...]:
        """Return the bytes of each tensor kept between steps, in the order in which a first step makes them."""
        sizes = []
        for parameter in parameters:
            if self.factored and parameter.dim() > 1:
                sizes += [FLOAT32 * (parameter.numel() // parameter.shape[-1])]
                sizes += [FLOAT32 * (parameter.numel() // parameter.shape[-2])]
            elif self.factored:
                sizes += [FLOAT32 * parameter.numel()]
            else:
                sizes += [int(parameter.numel() * (self.width or parameter.element_size()))] * self.tensors
        return tuple(sizes)

    def step_tensors(self, parameters: "Iterable[Tensor]") -> tuple[int, ...]:
        """Return the bytes of the temporaries that a step makes for each parameter."""
        if self.at_once:
            return tuple(
                int(parameter.numel() * parameter.element_size() * self.step) for parameter in parameters if self.step
            )
        sizes = [int(self._tensor_bytes(parameter) * self._own_tensors(parameter)) for parameter in parameters]
        return tuple(size for size in sizes if size)

    def spared_bytes(self, values: int) -> int:
        """Return the bytes kept in addition because so many of the values are embeddings'."""
        if not self.spares_embeddings or self.width is None or version_of("transformers") < SPARES_SINCE:
            return 0
        return int(values * self.tensors * (FLOAT32 - self.width))

    def step_bytes(self, parameters: "Iterable[Tensor]") -> int:
        """Return the most that a step on `parameters` adds."""
        parameters = list(parameters)
        if self.at_once:
            return int(self.step * sum(parameter.numel() * parameter.element_size() for parameter in parameters))
        own = [self._tensor_bytes(parameter) * self._own_tensors(parameter) for parameter in parameters]
        # The largest come one behind the other: a layer has several matrices of one size.
        left = sorted((self._tensor_bytes(parameter) * self.left for parameter in parameters), reverse=True)
        return int(max(own, default=0) + (left[1] if len(left) > 1 else 0))

    def _tensor_bytes(self, parameter: "Tensor") -> int:
        return parameter.numel() * (FLOAT32 if self.widened else parameter.element_size())

    def _own_tensors(self, parameter: "Tensor") -> float:
        return self.step + (2 if self.widened and parameter.element_size() != FLOAT32 else 0)


_FOREACH_ADAM = Optimizer(2, step=1, at_once=True)
_FUSED = Optimizer(2)
_EIGHT_BIT = Optimizer(2, QUANTIZED, spares_embeddings=True)
_EIGHT_BIT_LION = Optimizer(1, QUANTIZED, spares_embeddings=True)
_PAGED = Optimizer()  # paged state lives in host memory and visits the device

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": _FOREACH_ADAM, "adamw_torch": _FOREACH_ADAM, "adamw_hf": Optimizer(2, step=1, left=1),
    "adamw_torch_fused": _FUSED, "adamw_apex_fused": _FUSED,
    "adamw_torch_xla": _FUSED, "adamw_torch_npu_fused": _FUSED, "adamw_anyprecision": Optimizer(2, step=2),
    "adamw_8bit": _EIGHT_BIT, "adamw_bnb_8bit": _EIGHT_BIT, "ademamix": Optimizer(3, FLOAT32),
    "ademamix_8bit": Optimizer(3, QUANTIZED, spares_embeddings=True),
    "paged_ademamix_32bit": _PAGED, "paged_ademamix_8bit": _PAGED,
    "paged_adamw": _PAGED, "paged_adamw_32bit": _PAGED, "paged_adamw_8bit": _PAGED,
    "lion": Optimizer(1, FLOAT32), "lion_32bit": Optimizer(1, FLOAT32), "lion_8bit": _EIGHT_BIT_LION,
    "paged_lion": _PAGED, "paged_lion_32bit": _PAGED, "paged_lion_8bit": _PAGED,
    "sgd": Optimizer(), "adagrad": Optimizer(1, step=2, at_once=True), "rmsprop": Optimizer(1, step=1, at_once=True),
    "rmsprop_bnb": Optimizer(1, FLOAT32), "rmsprop_bnb_32bit": Optimizer(1, FLOAT32),
    "rmsprop_bnb_8bit": _EIGHT_BIT_LION, "adafactor": Optimizer(factored=True, step=2, left=1, widened=True),
}  # fmt: skip


def optimizer_named(name: str) -> Optimizer:
    """Return the optimizer that `name` means; AdamW, the default and the largest of the common ones, if unknown."""
    return OPTIMIZERS.get(name, _FOREACH_ADAM)
