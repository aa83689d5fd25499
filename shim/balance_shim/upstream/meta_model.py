"""A model from its config alone, just as the library has it when it makes a device map: no weights, no accelerator.

`from_pretrained` itself is run, up to the seam that `loading` patches. So dtype rules, quantizer and ties are those of
a real load in each version of transformers, and what "auto" would give is asked of the library's own function.
"""

import importlib.util
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..map_file import DeviceMap
from ..versions import dtype_name, version_of
from .weight_sizes import ParameterBytes, for_dtypes, for_request

if TYPE_CHECKING:
    from torch import nn

# The host's part in the library's rule is only what overflows, so any amount will do that no model exceeds.
HOST_MEMORY = 1 << 50


@dataclass(frozen=True)
class Unloaded:
    """A model on the meta device that is ready to be placed.

    Attributes:
        model: quantizer-prepared.
        no_split: class names of modules that must stay whole; None: those that the model declares.
        parameter_bytes: (name, parameter) -> bytes as it will be loaded; None: as it stands.
        auto_map: what transformers makes of `device_map="auto"` on the devices in question; None when it fails.
        auto_failure: why it does.
    """

    model: "nn.Module"
    no_split: Collection[str] | None
    parameter_bytes: ParameterBytes | None
    auto_map: DeviceMap | None
    auto_failure: str = ""


class _Reached(BaseException):
    """Thrown from the seam to end the load there; not an `Exception`, which libraries may catch."""

    def __init__(self, model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args_given, self.kwargs_given = model, args, kwargs


def unloaded(model_class: Any, config: Any, dtype: Any, capacities: Sequence[int]) -> Unloaded:
    """Return a model of `model_class` for `config`, and the library's own map for devices of `capacities` bytes.

    Raises:
        ImportError: its quantization needs a package that is not there.
        Exception: whatever the model's or the library's code raises on the way.
    """
    import torch
    from transformers import modeling_utils

    before = version_of("transformers") < (4, 50)
    seam = "infer_auto_device_map" if before else "_get_device_map"
    original = getattr(modeling_utils, seam)

    def stop(model: "nn.Module", *args: Any, **kwargs: Any) -> Any:
        raise _Reached(model, args, kwargs)

    usual = torch.get_default_dtype()
    with _replaced(modeling_utils, seam, stop), _quantizers_for_elsewhere(), _numbered_devices():
        try:
            model_class.from_pretrained(
                None,
                config=config,
                state_dict={},
                # Means the same as "auto", which 4.50 to 4.53 take for tensor parallelism where WORLD_SIZE is set.
                device_map="balanced",
                max_memory=_max_memory(capacities),
                **{dtype_name(): dtype},
            )
        except _Reached as reached:
            stopped = reached
        else:
            raise RuntimeError(f"{model_class.__name__}.from_pretrained made no device map")
        finally:
            torch.set_default_dtype(usual)  # 4.x sets it for the whole load, whose end is never reached
        auto_map, failure = None, ""
        try:
            auto_map = dict(original(stopped.model, *stopped.args_given, **stopped.kwargs_given))
        except Exception as error:  # its failures are its own, and worth telling
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
    if before:
        kwargs = stopped.kwargs_given
        sizes = for_dtypes(stopped.model, kwargs.get("dtype"), kwargs.get("special_dtypes"))
        return Unloaded(stopped.model, kwargs.get("no_split_module_classes"), sizes, auto_map, failure)
    arguments = inspect.signature(original).bind(stopped.model, *stopped.args_given, **stopped.kwargs_given).arguments
    sizes_as_loaded = for_request(
        stopped.model, arguments.get("hf_quantizer"), arguments.get("dtype", arguments.get("torch_dtype"))
    )
    return Unloaded(stopped.model, _no_split(stopped.model), sizes_as_loaded, auto_map, failure)


def _no_split(model: Any) -> Collection[str] | None:
    if version_of("transformers") < (5, 1):  # it gathers those of the models inside
        try:
            return list(model._get_no_split_modules("auto"))
        except ValueError:  # the model declares none, which the library refuses; our own rule needs none
            return None
    return getattr(model, "_no_split_modules", None)


def _max_memory(capacities: Sequence[int]) -> dict[int | str, int]:
    """Return the `max_memory` that the library would compute on a machine with these devices."""
    # A single device that nobody has set a limit for is filled to nine tenths; here a limit has to be set.
    share = 0.9 if len(capacities) == 1 else 1
    return {**{index: int(share * capacity) for index, capacity in enumerate(capacities)}, "cpu": HOST_MEMORY}


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _quantizers_for_elsewhere() -> Iterator[None]:
    """Let quantizers prepare a model for devices that are not here.

    Their check of the environment is about this machine: without an accelerator it refuses, or quietly turns
    quantization off. Only its errors about missing packages count here.
    """
    from transformers.quantizers import auto

    original = auto.AutoHfQuantizer.__dict__["from_config"]

    def from_config(*args: Any, **kwargs: Any) -> Any:
        quantizer = original.__get__(None, auto.AutoHfQuantizer)(*args, **kwargs)
        check = quantizer.validate_environment

        def validate_environment(*args: Any, **kwargs: Any) -> None:
            as_asked = dict(vars(quantizer.quantization_config))
            try:
                check(*args, **kwargs)
            except ImportError as error:
                package = _package_named_in(str(error))
                # Some libraries count as missing where there is no accelerator for them.
                if package is None or importlib.util.find_spec(package) is None:
                    raise
            except Exception:
                pass
            if "dequantize" in as_asked:
                quantizer.quantization_config.dequantize = as_asked["dequantize"]

        quantizer.validate_environment = validate_environment
        return quantizer

    with _replaced(auto.AutoHfQuantizer, "from_config", staticmethod(from_config)):
        yield


def _package_named_in(message: str) -> str | None:
    """Return the package that a library's line on a missing package is about, if it is one of those we know."""
    packages = (
        "bitsandbytes",
        "gptqmodel",
        "optimum",
        "autoawq",
        "torchao",
        "compressed_tensors",
        "hqq",
        "eetq",
        "quanto",
    )
    return next((package for package in packages if package in message), None)


@contextmanager
def _numbered_devices() -> Iterator[None]:
    """Let accelerate count numbered devices on a machine without any.

    Up to 1.14 it asks torch what kind of device a number stands for, which has no answer there. It expects "cuda" where
    it finds no other kind.
    """
    import torch
    from accelerate.utils import modeling

    try:
        torch.device(0)
    except RuntimeError:
        with _replaced(modeling, "torch", _Torch(torch)):
            yield
    else:
        yield


class _Torch:
    """torch, except for the meaning of a bare number as a device."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def device(self, device: Any) -> Any:
        return self._torch.device("cuda", device) if isinstance(device, int) else self._torch.device(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)
