"""The DeepSpeed config: complete for any model, and overridden by the user's config.

Sources: DeepSpeed's config reference, and transformers' handling of "auto" (`integrations/deepspeed.py`).
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import state, zero_config_file
from .launching.rank_environment import SMALLEST_DEVICE

if TYPE_CHECKING:
    from torch import nn

Config = dict[str, Any]

# Fields that transformers derives from the config's `hidden_size`, which not every vision-language config has.
HIDDEN_SIZE_KEYS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def own(offload: str = "none") -> Config:
    """Return our config. transformers replaces "auto" by the value of the `TrainingArguments`.

    The optimizer and the scheduler are the Trainer's, so there is none in it. Nor is there a `train_batch_size`, which
    follows from what is there and the number of processes.

    Args:
        offload: "none", "optimizer", or "all" (weights too): the tensors kept in host memory.
    """
    zero: Config = {
        "stage": 3,
        "contiguous_gradients": True,
        "overlap_comm": False,  # would keep a second set of buckets
        # Parameters in one step of the optimizer, whose float32 gradients exist at a time: 400 MB, not 4 GB.
        "sub_group_size": int(1e8),
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": live_parameters(),
        "stage3_max_reuse_distance": live_parameters(),
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,  # whatever the Trainer brings
        "zero_force_ds_cpu_optimizer": False,  # with offload too: DeepSpeed's own has to be compiled
        "steps_per_print": 2**31 - 1,
    }


def live_parameters() -> int:
    """Return how many parameters may be whole at a time: a twentieth of the smallest device in 16 bits, at most 1e9.

    All ranks must have the same number, because they gather together; so it comes from their launcher.
    """
    text = os.environ.get(SMALLEST_DEVICE, "")
    return min(int(1e9), int(text) // 40) if text.isdigit() else int(1e9)


def for_training(script: Any) -> tuple[Config, list[str]]:
    """Return the config for `TrainingArguments`, and the names of the fields added to the user's own config.

    Args:
        script: the script's argument `deepspeed`: a path, JSON, a dict, or nothing; then the config of
            `accelerate launch` counts.

    Raises:
        SettingError: the config cannot be read, or asks for another stage.
    """
    settings = state.settings()
    own_config = own(settings.offload)
    if isinstance(script, Mapping):
        user_config = zero_config_file.checked(dict(script), "the DeepSpeed config of the script")
    elif script:
        user_config = zero_config_file.read(os.fspath(script), "the DeepSpeed config of the script")
    else:
        user_config = zero_config_file.of_accelerate(os.environ)
    user_config = merged(user_config, settings.zero_config or {})
    config = merged(own_config, user_config)
    config["zero_optimization"]["stage"] = 3
    if config.get("train_batch_size") == "auto":
        # transformers would fill in what it believes the number of processes to be.
        del config["train_batch_size"]
    if "optimizer" in user_config:
        config.pop("zero_force_ds_cpu_optimizer", None)
    return config, missing(own_config, user_config) if user_config else []


def for_loading(dtype: Any) -> Config:
    """Return the config for a model that loads before there are `TrainingArguments`: how to divide it, and its type.

    Args:
        dtype: the torch dtype that its weights are to have.
    """
    zero = for_training(None)[0]["zero_optimization"]
    fixed = {name: value for name, value in zero.items() if value != "auto"}
    config = {"zero_optimization": fixed, "train_micro_batch_size_per_gpu": 1}
    return {**config, **precision(dtype)}


def precision(dtype: Any) -> Config:
    """Return the part of a config that makes DeepSpeed keep weights of `dtype`."""
    name = str(dtype).rpartition(".")[2]
    return {"bf16": {"enabled": name == "bfloat16"}, "fp16": {"enabled": name == "float16"}}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Config:
    """Return both configs in one; `above` wins, key by key down into the objects."""
    result = dict(below)
    for name, value in above.items():
        under = result.get(name)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        result[name] = merged(under, value) if both else value  # type: ignore[arg-type]
    return result


def missing(config: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the full names of the keys of `config` that `other` does not have, such as "zero_optimization.stage"."""
    names = []
    for name, value in config.items():
        if name not in other:
            names.append(prefix + name)
        elif isinstance(value, Mapping) and isinstance(other[name], Mapping):
            names += missing(value, other[name], f"{prefix}{name}.")
    return names


def fill_hidden_size(config: Config, model: "nn.Module") -> None:
    """Put numbers where `config` has "auto" in fields that follow from the width of `model`, by transformers' rule."""
    zero = config.get("zero_optimization", {})
    if all(zero.get(key) != "auto" for key in HIDDEN_SIZE_KEYS):
        return
    width = hidden_size(model)
    values = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    for key, value in values.items():
        if zero.get(key) == "auto":
            zero[key] = value


def hidden_size(model: "nn.Module") -> int:
    """Return the width of the language model in `model`, else of its widest part, else of its widest matrix."""
    config = getattr(model, "config", None)
    for part in ("text_config", "llm_config", "language_config", "thinker_config", None):
        widths = _widths(config if part is None else getattr(config, part, None))
        if widths:
            return max(widths)
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict")] if config is not None else []
    widths = [width for nested in inner for width in _widths(nested)]
    shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in model.parameters()]
    return max(widths, default=0) or max((min(shape) for shape in shapes if len(shape) == 2), default=1024)


def _widths(config: Any) -> list[int]:
    """Return the width in a config; `hidden_sizes` of some is a list."""
    widths: list[int] = []
    for name in ("hidden_size", "hidden_sizes", "d_model", "n_embd"):
        value = getattr(config, name, None)
        widths += [
            number for number in (value if isinstance(value, list | tuple) else [value]) if isinstance(number, int)
        ]
    return widths
