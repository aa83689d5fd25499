"""What ZeRO-3 needs to be installed, said in one line before any process is started for it."""

from .. import devices
from ..errors import BalanceError
from ..versions import numbers, version_text

IMPORTS_WITHOUT_TOOLKIT = "0.19.8"  # DeepSpeed#8216; older ones look for nvcc when imported on a machine with a GPU
OLDEST = {"deepspeed": "0.16.0", "accelerate": "1.0.0"}


def check() -> None:
    """Raise where a library that ZeRO-3 needs is missing or too old.

    Raises:
        BalanceError: what to install.
    """
    for library, oldest in OLDEST.items():
        found = version_text(library)
        remedy = f"(pip install -U '{library}>={oldest}')"
        if not found:
            raise BalanceError(f"BALANCE_MODE=zero3 needs {library}, which is not installed {remedy}")
        if numbers(found) < numbers(oldest):
            raise BalanceError(f"BALANCE_MODE=zero3 needs {library} {oldest} or newer; {found} is installed {remedy}")
    problem = missing_toolkit(version_text("deepspeed"))
    if problem:
        raise BalanceError(f"BALANCE_MODE=zero3: {problem}")


def missing_toolkit(version: str) -> str:
    """Return why DeepSpeed `version` cannot be imported on this machine for want of the CUDA toolkit; "" if it can."""
    if numbers(version) >= numbers(IMPORTS_WITHOUT_TOOLKIT) or devices.accelerator_type() != "cuda":
        return ""
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None or cpp_extension.CUDA_HOME is not None:
        return ""
    return (
        f"deepspeed {version} needs the CUDA toolkit to be imported where there is a GPU, and finds none: "
        f"pip install -U 'deepspeed>={IMPORTS_WITHOUT_TOOLKIT}', or set CUDA_HOME to a toolkit"
    )
