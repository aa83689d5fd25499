"""A copy of a model to trace: the same modules, with traced tensors, each block on the device it is given.

The original is not touched, so it may be on the meta device, half loaded, or in use.
"""

import copy
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...upstream import fused_head
from ...upstream.quantized import is_quantized_linear
from ...virtual.machine import Machine
from ..ties import tied_groups
from ..training_case import Trains
from .errors import CannotTrace
from .machine import traced
from .plain_kernels import strip_kernels
from .quantized import DequantizingLinear
from .rebound import rebind

if TYPE_CHECKING:
    from torch import Tensor

# Whose hooks run in a copy; transformers_modules is code that comes with a model.
LIBRARIES = (
    "torch", "transformers", "transformers_modules", "accelerate", "peft", "trl", "swift", "bitsandbytes", "unsloth",
)  # fmt: skip


class PassOn(nn.Module):
    """In place of a layer that is like one that runs: returns its input, in the form that layers return."""

    def __init__(self, original: nn.Module, form: "Form") -> None:
        super().__init__()
        self.__dict__["_original"] = original  # models ask their layers for attributes such as attention_type
        self.__dict__["_form"] = form

    def __deepcopy__(self, _: Any) -> "PassOn":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # marks of those who have wrapped the original, and nothing that a model asks for
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        return getattr(self.__dict__["_original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        # A tensor of its own, on its device: not the output of the layer before it.
        return self._form.made_of(hidden.view_as(hidden))


class Form:
    """The form of the outputs of one list's layers: a tensor, or a tuple with no second tensor in it."""

    def __init__(self) -> None:
        self._rest: tuple[Any, ...] | None = None

    def __deepcopy__(self, _: Any) -> "Form":
        return self  # the layers that learn it and those that follow it stay together

    def learn(self, _: nn.Module, __: Any, output: Any) -> None:
        """Be a forward hook of a layer that runs."""
        if isinstance(output, torch.Tensor):
            self._rest = None
        elif isinstance(output, tuple) and output and not any(isinstance(item, torch.Tensor) for item in output[1:]):
            self._rest = output[1:]
        else:
            raise CannotTrace("its layers pass on more than hidden states")

    def forget(self, *_: Any) -> None:
        """Be a forward hook of the model: keep the form only, not the cache that 4.x hands through its layers."""
        if self._rest is not None:
            self._rest = (None,) * len(self._rest)

    def made_of(self, hidden: Any) -> Any:
        return hidden if self._rest is None else (hidden, *self._rest)


def copy_of(
    model: nn.Module,
    twin_of: "Callable[[str, Tensor], Tensor]",
    left_out: Iterable[str] = (),
    trains: Trains | None = None,
) -> nn.Module:
    """Return a copy of `model` that has other tensors; tensors that are, or will be, tied are one in it.

    Args:
        twin_of: (full name, tensor) -> the copy's tensor.
        left_out: full names of layers that do not run, because another one represents them.
        trains: which parameters get gradients; None: as they are set in `model`.

    Raises:
        CannotTrace: something in the model cannot be copied.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    forms: dict[str, Form] = {}
    memo: dict[int, Any] = {}
    for name in left_out:
        memo[id(modules[name])] = PassOn(modules[name], forms.setdefault(name.rpartition(".")[0], Form()))
    outside = tuple(f"{name}." for name in left_out)
    shared = {name: number for number, group in enumerate(tied_groups(model)) for name in group}
    tied: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(outside) or id(parameter) in memo:
            continue
        if shared.get(name) in tied:
            memo[id(parameter)] = tied[shared[name]]
            continue
        needs = parameter.requires_grad if trains is None else trains(name, parameter)
        memo[id(parameter)] = nn.Parameter(
            twin_of(name, parameter), requires_grad=needs and parameter.is_floating_point()
        )
        if name in shared:
            tied[shared[name]] = memo[id(parameter)]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if not name.startswith(outside):
            memo.setdefault(id(buffer), twin_of(name, buffer))
    for name, module in modules.items():
        if not name.startswith(outside) and is_quantized_linear(module):
            memo[id(module)] = _plain_linear(name, module, twin_of)
    try:
        twin: nn.Module = copy.deepcopy(model, memo)
        rebind(twin, memo)
        _strip(twin)
    except Exception as error:
        raise CannotTrace(f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error})") from error
    for list_name, form in forms.items():
        for layer in twin.get_submodule(list_name).children():
            if not isinstance(layer, PassOn):
                layer.register_forward_hook(form.learn)
        twin.register_forward_hook(form.forget)
    return twin


def traced_copy(
    model: nn.Module,
    machine: Machine,
    device_of: Callable[[str], int],
    left_out: Iterable[str] = (),
    trains: Trains | None = None,
) -> nn.Module:
    """Return a copy of `model` on `machine`; `device_of` gives the index of the device of each tensor by its name.

    Raises:
        CannotTrace: something in the model cannot be copied.
    """
    return copy_of(model, lambda name, tensor: traced(tensor, device_of(name), machine), left_out, trains)


def _plain_linear(name: str, module: Any, twin_of: "Callable[[str, Tensor], Tensor]") -> nn.Module:
    """Return a frozen linear layer for a quantized one, whose kernels do not run on shapes; it keeps the same."""
    linear = DequantizingLinear(module.in_features, module.out_features)
    if getattr(module, "compute_type_is_set", False):
        linear.compute_dtype = module.compute_dtype
    linear.weight = nn.Parameter(twin_of(f"{name}.weight", linear.weight), requires_grad=False)
    return linear


def _strip(model: nn.Module) -> None:
    """Remove accelerate's hooks for the real devices, and wrappers that scripts have put around modules."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        from accelerate.hooks import remove_hook_from_submodules

        # Put in after accelerate's hook, whose removal would bring back the class's own; accelerate's is a partial.
        replaced = {
            module: vars(module)["forward"]
            for module in model.modules()
            if hasattr(module, "_hf_hook") and isinstance(vars(module).get("forward"), types.MethodType)
        }
        remove_hook_from_submodules(model)
        for module, forward in replaced.items():
            module.forward = forward
    model.__dict__.pop("hf_device_map", None)
    strip_kernels(model)
    fused_head.renew(model)
    for module in model.modules():
        # A plain function is not copied, so it would run the original: with its weights, which would get gradients.
        own = type(module).forward is not nn.Module.forward
        if own and isinstance(vars(module).get("forward"), types.FunctionType):
            del module.forward
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for handle in [handle for handle, hook in hooks.items() if not _is_of_a_library(hook)]:
                del hooks[handle]


def _is_of_a_library(hook: Any) -> bool:
    """Whether a hook belongs to how the model works. Those of the user's script count or keep what they see."""
    function = getattr(hook, "func", hook)  # of a functools.partial
    home = getattr(function, "__module__", None) or type(function).__module__
    return str(home).partition(".")[0] in LIBRARIES
