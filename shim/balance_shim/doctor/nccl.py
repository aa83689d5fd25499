"""NCCL, CUDA and the driver against each other: mismatches that end in hangs or "unhandled system error"."""

import os
from typing import NamedTuple

from ..versions import numbers, version_text
from .section import Section


class Stack(NamedTuple):
    """Versions as texts; "" where there is none.

    Attributes:
        built_for: the CUDA version that torch was built for.
        driver: the newest CUDA version that the driver can run.
        loaded: the NCCL that is in use in this process.
        packaged: the NCCL package that pip has installed with torch.
        search_path: `LD_LIBRARY_PATH`.
    """

    built_for: str
    driver: str
    loaded: str
    packaged: str
    search_path: str = ""


def examine() -> Section:
    """Return the versions of NCCL and CUDA on this machine, and the pairs that do not go together."""
    stack = installed()
    if not stack.built_for:
        import torch

        kind = "ROCm (RCCL)" if torch.version.hip else "no CUDA"
        return Section("NCCL and CUDA", f"  this torch is built for {kind}")
    lines = (
        f"  torch is built for CUDA {stack.built_for}; the driver runs up to CUDA {stack.driver or 'unknown'}",
        f"  NCCL {stack.loaded or 'unknown'} is loaded; the installed package is {stack.packaged or 'unknown'}",
    )
    return Section("NCCL and CUDA", "\n".join(lines), tuple(problems(stack)))


def installed() -> Stack:
    """Return the versions of this process."""
    import torch

    built_for = torch.version.cuda or ""
    if not built_for:
        return Stack("", "", "", "")
    driver = loaded = ""
    if torch.cuda.is_available():
        number = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 12040 is 12.4
        driver = f"{number // 1000}.{number % 1000 // 10}"
        loaded = ".".join(map(str, torch.cuda.nccl.version()))
    packaged = version_text(f"nvidia-nccl-cu{built_for.partition('.')[0]}")
    return Stack(built_for, driver, loaded, packaged, os.environ.get("LD_LIBRARY_PATH", ""))


def problems(stack: Stack) -> list[str]:
    """Return a line for each pair of versions in `stack` that does not go together."""
    faults = []
    if stack.built_for and not stack.driver:
        faults.append(f"torch for CUDA {stack.built_for} sees no device: install a driver, or torch's CPU build")
    if stack.driver and numbers(stack.driver)[:1] < numbers(stack.built_for)[:1]:
        faults.append(
            f"the driver runs CUDA up to {stack.driver}, and torch needs {stack.built_for}: update the driver, or "
            f"install a torch for CUDA {numbers(stack.driver)[0]}"
        )
    if stack.loaded and stack.packaged and numbers(stack.loaded)[:2] != numbers(stack.packaged)[:2]:
        search_path = f"; LD_LIBRARY_PATH={stack.search_path}" if stack.search_path else ""
        faults.append(
            f"NCCL {stack.loaded} is loaded although {stack.packaged} was installed with torch{search_path}: another "
            "copy is found first; remove it from LD_LIBRARY_PATH and LD_PRELOAD"
        )
    return faults
