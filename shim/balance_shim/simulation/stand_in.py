"""The module that `import torch_npu` returns on a simulated machine.

Trainers import the package to find out whether there are devices. ms-swift also replaces parts of models by its fused
operations; here these are the plain operations that the models had, so that memory is as without the replacement.
"""

import importlib.machinery
import sys
import types
from typing import Any, NoReturn

import torch

__version__ = "0.0.0+simulated"


def npu_rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised `hidden`, and the reciprocal of the root mean square."""
    wide = hidden.to(torch.float32)
    reciprocal = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * reciprocal).to(hidden.dtype), reciprocal


def npu_rotary_mul(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return `hidden` turned by the angles whose cosines and sines are given, halves paired."""
    first, second = hidden.chunk(2, dim=-1)
    return hidden * cos + torch.cat((-second, first), dim=-1) * sin


def npu_swiglu(hidden: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Return SiLU of the first half of `hidden` times the second half."""
    gate, up = hidden.chunk(2, dim=dim)
    return torch.nn.functional.silu(gate) * up


def npu_fusion_attention(*_: Any, **__: Any) -> NoReturn:
    """Raise: there is no flash-attention package for simulated devices."""
    raise NotImplementedError('simulated devices have no flash_attention_2; attn_implementation="sdpa" counts the same')


def make_package(backend: types.ModuleType) -> dict[str, types.ModuleType]:
    """Return the entries of `sys.modules` for `import torch_npu` and `torch_npu.npu` to work."""
    package = types.ModuleType("torch_npu", __doc__)
    package.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None, is_package=True)
    package.__path__ = []
    functions = (npu_fusion_attention, npu_rms_norm, npu_rotary_mul, npu_swiglu)
    vars(package).update({function.__name__: function for function in functions}, __version__=__version__, npu=backend)
    return {"torch_npu": package, "torch_npu.npu": backend}


def is_installed() -> bool:
    """Whether a real `torch_npu` is there to be imported."""
    return "torch_npu" in sys.modules or importlib.machinery.PathFinder.find_spec("torch_npu") is not None
