"""Seam 1, `transformers.modeling_utils`: where a string such as "auto" becomes a device map.

From 4.50 on that is `_get_device_map`, a function of its own; up to 4.49 it stands inside `from_pretrained`, which
calls `infer_auto_device_map` by a name imported into this module. Either way the model is on the meta device and the
quantizer has prepared it. `from_pretrained` itself is patched for what has to happen earlier.
"""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import modes, state
from ..map_file import DeviceMap
from ..patching import registry
from ..patching.guard import SeamMoved, attempt
from ..placement.model_load import ModelLoad, calls
from ..upstream.weight_sizes import for_dtypes, for_request
from ..versions import version_of, version_text
from .model_device import around_device

if TYPE_CHECKING:
    from torch import nn


def apply(module: ModuleType) -> None:
    """Patch `transformers.modeling_utils`.

    Raises:
        SeamMoved: this version keeps the seam somewhere else.
    """
    version = version_of("transformers")
    seam, wrapper = ("_get_device_map", _around_get_device_map)
    if version < (4, 50):
        seam, wrapper = ("infer_auto_device_map", _around_infer_auto_device_map)
    for owner, name in ((getattr(module, "PreTrainedModel", None), "from_pretrained"), (module, seam)):
        if not callable(getattr(owner, name, None)):
            raise SeamMoved(f"transformers.modeling_utils.{name}", version_text("transformers"))
    registry.replace(module.PreTrainedModel, "from_pretrained", _around_from_pretrained)
    registry.replace(module, seam, wrapper)
    registry.replace(module.PreTrainedModel, "save_pretrained", _around_save_pretrained)
    if isinstance(getattr(module.PreTrainedModel, "device", None), property):
        registry.replace(module.PreTrainedModel, "device", around_device)


def _around_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        state.raise_pending()
        return modes.current().load(original, cls, args, kwargs)

    return from_pretrained


def _around_save_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        return modes.current().save(original, self, args, kwargs)

    return save_pretrained


def _around_get_device_map(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_device_map(model: "nn.Module", device_map: Any, *args: Any, **kwargs: Any) -> Any:
        planned = attempt("planning the device map", _plan_load, original, model, device_map, args, kwargs)
        if planned is None:
            return original(model, device_map, *args, **kwargs)
        # Given a map, the library checks it (4.x: its ties) but no longer asks the quantizer, so we do.
        checked = original(model, planned, *args, **kwargs)
        quantizer = _bind(original, model, device_map, args, kwargs).get("hf_quantizer")
        if quantizer is not None:
            quantizer.validate_environment(device_map=checked)
        return checked

    return get_device_map


def _plan_load(
    original: Callable[..., Any], model: Any, device_map: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> DeviceMap | None:
    if not modes.current().makes_map(device_map):
        return None
    bound = _bind(original, model, device_map, args, kwargs)
    quantizer, dtype = bound.get("hf_quantizer"), bound.get("dtype", bound.get("torch_dtype"))
    no_split = model._no_split_modules
    if version_of("transformers") < (5, 1):
        try:
            no_split = model._get_no_split_modules(device_map)
        except ValueError:
            return None  # the model does not support device maps, and the library says so
    sizes = for_request(model, quantizer, dtype)
    return modes.current().device_map_for(ModelLoad(model, device_map, bound.get("max_memory"), no_split, sizes))


def _bind(
    original: Callable[..., Any], model: Any, device_map: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments by name: their number and order change between versions."""
    from inspect import signature

    return dict(signature(original).bind(model, device_map, *args, **kwargs).arguments)


def _around_infer_auto_device_map(original: Callable[..., Any]) -> Callable[..., Any]:
    def infer_auto_device_map(model: "nn.Module", *args: Any, **kwargs: Any) -> Any:
        planned = attempt("planning the device map", _plan_inferred, model, kwargs)
        return original(model, *args, **kwargs) if planned is None else planned

    return infer_auto_device_map


def _plan_inferred(model: "nn.Module", kwargs: dict[str, Any]) -> DeviceMap | None:
    call = calls.innermost()
    device_map, max_memory = (None, None) if call is None else (call.device_map, call.max_memory)
    if not modes.current().makes_map(device_map):
        return None
    sizes = for_dtypes(model, kwargs.get("dtype"), kwargs.get("special_dtypes"))
    assert isinstance(device_map, str), "only strings are intercepted"
    no_split = kwargs.get("no_split_module_classes")
    return modes.current().device_map_for(ModelLoad(model, device_map, max_memory, no_split, sizes))
