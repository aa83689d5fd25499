"""`BALANCE_PRECISION`: the dtype of loading and the mixed precision of training, in one word.

* `bf16`: weights load in bfloat16 and train so, matrix products in bfloat16 whatever the weights (adapters) are.
* `fp16`: products in float16 with loss scaling. It needs float32 weights where they train, so only a model that does
  not train itself (`BALANCE_TUNING=lora`), or one that DeepSpeed keeps master weights of, loads in float16.
* `fp32`: everything in float32.
"""

import inspect
from typing import Any

from .. import devices, log, state
from ..upstream.trainer import TrainingArgumentsLike
from ..versions import dtype_name

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Where arguments keep whether the script has mixed precision: an attribute, as they cannot be hashed, and their copies
# need it too.
_SCRIPTS = "_balance_shim_autocast"


def chosen() -> str | None:
    """Return the precision to use, "bf16", "fp16" or "fp32": the requested one or, failing that, the nearest.

    None where nothing was asked for. A precision that the device lacks is logged once.
    """
    requested = state.settings().precision
    if requested is None or requested == "fp32":
        return requested
    kind = devices.accelerator_type()
    precision = requested
    if kind is None and requested == "fp16":
        precision = "bf16"
    elif kind is not None and requested == "bf16" and not _computes_bf16(kind):
        precision = "fp16"
    if precision != requested:
        place = "the CPU" if kind is None else kind
        log.once("warning", f"BALANCE_PRECISION={requested}: {place} does not support it; using {precision}")
    return precision


def adjust_arguments(arguments: TrainingArgumentsLike) -> None:
    """Put the precision into `TrainingArguments` that are being made."""
    precision = chosen()
    if precision is None:
        return
    before = next((kind for kind in ("bf16", "fp16") if getattr(arguments, kind)), None)
    vars(arguments)[_SCRIPTS] = before is not None
    if before not in (None, precision):
        log.once("info", f"BALANCE_PRECISION={precision}: overrides the script's mixed precision, {before}")
    arguments.bf16, arguments.fp16 = precision == "bf16", precision == "fp16"


def autocast_of_script(arguments: TrainingArgumentsLike | None) -> bool:
    """Whether the script had mixed precision in the `TrainingArguments` that `adjust_arguments` has seen; None: no."""
    return arguments is not None and bool(vars(arguments).get(_SCRIPTS))


def loading_dtype() -> Any:
    """Return the torch dtype in which weights are to load; None: as the script sets it."""
    import torch

    precision = chosen()
    if precision is None:
        return None
    settings = state.settings()
    if precision == "fp16" and settings.tuning != "lora" and not settings.uses_deepspeed:
        return torch.float32  # the scaler refuses gradients in float16
    return getattr(torch, DTYPES[precision])


def adjust_loading(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` with the dtype of loading.

    Quantized weights keep theirs: what is left unquantized follows the quantizer's rules.
    """
    dtype = loading_dtype()
    if dtype is None or any(kwargs.get(name) for name in ("quantization_config", "load_in_4bit", "load_in_8bit")):
        return kwargs
    if getattr(kwargs.get("config"), "quantization_config", None):
        return kwargs
    name = "dtype" if "dtype" in kwargs else "torch_dtype"
    before = kwargs.get(name)
    if (
        before is not None
        and before != "auto"
        and str(before).removeprefix("torch.") != str(dtype).removeprefix("torch.")
    ):
        log.once("info", f"BALANCE_PRECISION: weights load in {_text(dtype)} instead of the script's {_text(before)}")
    remaining = {key: value for key, value in kwargs.items() if key not in ("dtype", "torch_dtype")}
    return {**remaining, dtype_name(): dtype}


def could_halve() -> bool:
    """Whether `BALANCE_PRECISION=bf16` would do something that nobody has decided otherwise, on these devices."""
    kind = devices.accelerator_type()
    return state.settings().precision is None and kind is not None and _computes_bf16(kind)


def _text(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _computes_bf16(kind: str) -> bool:
    """Whether all accelerators that training is likely to use multiply in bfloat16, not just the current one.

    Emulation, as on CUDA before compute capability 8.0, does not count.
    """
    import torch

    module = torch.get_device_module(kind)
    if kind == "cuda" and not torch.version.hip:
        return all(
            tuple(module.get_device_capability(index)) >= (8, 0) for index in devices.computing(state.settings())
        )
    check = getattr(module, "is_bf16_supported", None)
    if check is None:
        return True
    # torch.cuda has had the question since 2.3; other modules answer without it.
    asks = "including_emulation" in inspect.signature(check).parameters
    return bool(check(including_emulation=False) if asks else check())
