"""The variables that `accelerate launch` sets, by its options or its config file, to spread a model over devices."""

from collections.abc import Mapping

DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
# variable -> the feature that it asks for, besides DeepSpeed
OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def asks_for(variable: str, environ: Mapping[str, str]) -> bool:
    """Return whether `variable` is set to a word that accelerate takes for true."""
    return environ.get(variable, "").strip().lower() in ("1", "true", "yes", "y", "t", "on")
