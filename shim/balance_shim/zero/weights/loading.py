"""`from_pretrained` under ZeRO-3: remove conflicting arguments, and check that the model is partitioned."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ... import devices, log, zero_support
from ...patching.guard import attempt, insist
from ...upstream.loading_dtype import config_of, dtype_of
from .. import session
from . import inference_models, state_dicts, whole_loading
from .partitioned_parameter import look_whole

if TYPE_CHECKING:
    from torch import nn

# Arguments that transformers refuses together with ZeRO-3, or that have no meaning there.
DROPPED = ("device_map", "max_memory", "offload_folder", "low_cpu_mem_usage")
TENSOR_PARALLEL = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
# The config of a training -> the precision that was written into it.
_adopted: "WeakKeyDictionary[Any, str | None]" = WeakKeyDictionary()
_latest: Any = None  # the torch dtype of the weights that were loaded last


def load(original: Callable[..., Any], cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of `from_pretrained`, its parameters partitioned over the ranks.

    Raises:
        BalanceError: ZeRO-3 cannot be had, or not for this model.
    """
    is_mapped = kwargs.get("device_map") is not None
    kwargs = insist("preparing from_pretrained for ZeRO-3", _prepared, cls, args, kwargs)
    loaded = whole_loading.load(original, cls, args, kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
    check(model)
    attempt("dropping renamings that were not used", _drop_unused_renamings, model, instead="saving may use old names")
    look_whole(model)
    state_dicts.arm(model)
    inference_models.stand_by(model)
    if is_mapped:
        model.hf_device_map = {"": own_device()}  # which a script may print: without ZeRO-3 it would have one
    return loaded


def _drop_unused_renamings(model: Any) -> None:
    """Have `save_pretrained` undo only those renamings that the checkpoint needed, as without ZeRO-3.

    transformers 5 keeps all of them under ZeRO-3, and would save BERT's `LayerNorm.weight` as `LayerNorm.gamma`.
    Those that merge or split weights stay: it uses copies of them, so that the used ones cannot be told.
    """
    renamings = vars(model).get("_weight_conversions")
    if not renamings:
        return
    from transformers.core_model_loading import WeightRenaming

    model._weight_conversions = [
        renaming for renaming in renamings if not isinstance(renaming, WeightRenaming) or renaming.was_used()
    ]


def own_device() -> Any:
    """Return the device of this rank as maps have it: a number, or for the CPU an object.

    The string "cpu" would have PEFT take the weights for offloaded ones.
    """
    import torch

    return torch.device("cpu") if devices.accelerator_type() is None else int(os.environ.get("LOCAL_RANK", "0"))


def check(model: "nn.Module") -> None:
    """Warn if parameters of `model` are not partitioned: nothing else would show it."""
    unpartitioned = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_id")]
    if unpartitioned:
        log.warning(
            f"every process loaded {len(unpartitioned)} parameters of {type(model).__name__} in full "
            f"({unpartitioned[0]}, ...): ZeRO-3 partitions them when training begins, so "
            "each process needs room for the whole model"
        )


def adopt_precision(config: Any = None, dtype: Any = None) -> None:
    """Have DeepSpeed train half-precision weights as they are, where no arguments ask for mixed precision.

    Without that it would turn them into float32, at twice the memory. It keeps float32 master weights either way.

    Args:
        config: the config object of the `TrainingArguments`; by default the one that counts now.
        dtype: of the weights; by default of those that were loaded last. A reference or reward model may have been.
    """
    live = session.live_config() if config is None else config
    if live is None or not hasattr(live, "trainer_config_process"):
        return
    adopted = _adopted.get(live)
    requested = [kind for kind in ("bf16", "fp16") if live.config.get(kind, {}).get("enabled") is True]
    if requested not in ([], [adopted]):
        return
    dtype = _latest if dtype is None else dtype
    kind = {"bfloat16": "bf16", "float16": "fp16"}.get(str(dtype).rpartition(".")[2])
    if kind == "fp16" and not is_supported("fp16"):
        kind = "bf16"
    if adopted is not None:
        live.config[adopted]["enabled"] = False
    if kind is not None:
        live.config.setdefault(kind, {})["enabled"] = True
        log.once("info", f"the model loads in {dtype}: DeepSpeed trains it as {kind} with float32 master weights")
    _adopted[live] = kind


def main_dtype(model: "nn.Module") -> Any:
    """Return the dtype of most weights of `model`; adapters are often in another one."""
    counts: dict[Any, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + getattr(parameter, "ds_numel", parameter.numel())
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def is_supported(kind: str) -> bool:
    """Whether DeepSpeed trains in `kind`, "fp16" or "bf16", on the devices of this process."""
    from deepspeed.accelerator import get_accelerator

    return bool(getattr(get_accelerator(), f"is_{kind}_supported")())


def _prepared(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    global _latest
    session.begin()
    config = config_of(cls, args, kwargs)
    _refuse_tensor_parallel(cls, kwargs)
    _refuse_quantized(cls, config, kwargs)
    _latest = dtype = dtype_of(config, kwargs)
    session.remember_dtype(dtype)
    session.divide_from_now_on(dtype)
    adopt_precision()
    dropped = [name for name in DROPPED if kwargs.get(name) is not None]
    if "device_map" in dropped:
        log.once("info", zero_support.sentence("device_map", device_map=_shortened(kwargs["device_map"])))
    return {name: value for name, value in kwargs.items() if name not in DROPPED}


def _refuse_tensor_parallel(cls: Any, kwargs: dict[str, Any]) -> None:
    for name in TENSOR_PARALLEL:
        if kwargs.get(name) is not None:
            raise zero_support.refusal("tensor_parallel", cls=cls.__name__, name=name)


def _shortened(device_map: Any) -> str:
    return repr(device_map) if isinstance(device_map, str) else "{...}"


def _refuse_quantized(cls: Any, config: Any, kwargs: dict[str, Any]) -> None:
    requested = any(kwargs.get(name) for name in ("quantization_config", "load_in_4bit", "load_in_8bit"))
    if requested or getattr(config, "quantization_config", None):
        raise zero_support.refusal("quantized", cls=cls.__name__)
