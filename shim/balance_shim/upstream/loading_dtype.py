"""In which dtype a call of `from_pretrained` loads weights, by the rules of this version of transformers."""

from typing import Any

from .. import log
from ..versions import dtype_name, version_of


def config_of(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the model's config: Auto classes pass it on, others read it, as is done here. None: it cannot be read."""
    config = kwargs.get("config")
    if hasattr(config, "to_dict"):
        return config
    name = config or (args[0] if args else kwargs.get("pretrained_model_name_or_path"))
    passed = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code")
    options = {key: kwargs[key] for key in passed if key in kwargs}
    try:
        return cls.config_class.from_pretrained(name, **options)
    except Exception as error:  # the load itself will raise it
        log.debug(f"the config of {name} cannot be read ({type(error).__name__}: {error})")
        return None


def dtype_of(config: Any, kwargs: dict[str, Any]) -> Any:
    """Return the torch dtype that the weights will have."""
    import torch

    default = "auto" if version_of("transformers") >= (5,) else None
    requested = kwargs.get("dtype", kwargs.get("torch_dtype", default))
    if requested == "auto":
        requested = getattr(config, dtype_name(), None)
    if isinstance(requested, str):
        requested = getattr(torch, requested, None)
    return requested if isinstance(requested, torch.dtype) else torch.get_default_dtype()
