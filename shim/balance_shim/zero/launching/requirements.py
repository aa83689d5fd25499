"""Requirements of ZeRO-3, checked before any process starts."""

from ... import devices, zero_support
from ...versions import numbers, version_text

IMPORTS_WITHOUT_TOOLKIT = "0.19.8"  # DeepSpeed#8216; older ones look for nvcc when imported on a machine with a GPU
OLDEST = {"deepspeed": "0.16.0", "accelerate": "1.0.0"}


def check() -> None:
    """Raise where a library that ZeRO-3 needs is missing or too old.

    Raises:
        BalanceError: with the package to install.
    """
    for library, oldest in OLDEST.items():
        version = version_text(library)
        if not version:
            raise zero_support.refusal("library_missing", library=library, oldest=oldest)
        if numbers(version) < numbers(oldest):
            raise zero_support.refusal("library_too_old", library=library, oldest=oldest, version=version)
    version = version_text("deepspeed")
    if lacks_toolkit(version):
        raise zero_support.refusal("toolkit_missing", version=version, enough=IMPORTS_WITHOUT_TOOLKIT)


def lacks_toolkit(version: str) -> bool:
    """Return whether DeepSpeed `version` cannot be imported on this machine for want of the CUDA toolkit."""
    if numbers(version) >= numbers(IMPORTS_WITHOUT_TOOLKIT) or devices.accelerator_type() != "cuda":
        return False
    import torch
    from torch.utils import cpp_extension

    return torch.version.cuda is not None and cpp_extension.CUDA_HOME is None
