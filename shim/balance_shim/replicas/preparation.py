"""accelerate prepares a model on several devices for data-parallel training, which it refuses otherwise.

`DistributedDataParallel` takes such models as they are, without `device_ids`. accelerate knows that, behind a variable
(`ACCELERATE_BYPASS_DEVICE_MAP`), and refuses quantized ones all the same.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

from . import ranks, uneven

_VARIABLE = "ACCELERATE_BYPASS_DEVICE_MAP"


@contextmanager
def maps_allowed() -> Iterator[None]:
    """Have accelerate accept models with a device map of several entries, and pass no `device_ids` to DDP."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "true"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before


def is_within_share(model: Any) -> bool:
    """Return whether `model` has a device map that keeps to this rank's share, such as the copy of a placed model."""
    share = ranks.own_share()
    maps = [vars(module)["hf_device_map"] for module in model.modules() if vars(module).get("hf_device_map")]
    if share is None or not maps:
        return False
    return all(place in share for device_map in maps for place in device_map.values())


def prepare_placed(
    original: Callable[..., Any], accelerator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `original`, `Accelerator.prepare_model`, for a model that stays on its devices."""
    call = signature(original).bind(accelerator, *args, **kwargs)
    call.arguments["device_placement"] = False
    model = call.arguments["model"]
    becomes_replica = not call.arguments.get("evaluation_mode") and any(p.requires_grad for p in model.parameters())
    buckets = uneven.one_bucket_each() if becomes_replica and uneven.are_uneven(model) else nullcontext()
    with maps_allowed(), _quantized_map_hidden(model), buckets:
        return original(*call.args, **call.kwargs)


@contextmanager
def _quantized_map_hidden(model: Any) -> Iterator[None]:
    """Hide the map of a quantized model, by which alone accelerate sees that it is on several devices."""
    hidden = []
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        hidden = [module for module in model.modules() if "hf_device_map" in vars(module)]
    maps = [vars(module).pop("hf_device_map") for module in hidden]
    try:
        yield
    finally:
        for module, device_map in zip(hidden, maps, strict=True):
            module.hf_device_map = device_map
