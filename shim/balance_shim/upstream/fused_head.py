"""TRL's fused head (from 1.16 on): per-token log-probabilities of a causal model in tiles, without its logits.

`trl.trainer.utils.add_fused_lm_head` replaces `forward` of one model; trainers then call it with `fused_lm_head=True`.
A tile of the product is 4,096 tokens by 32,768 columns. On CUDA a Triton kernel folds a tile into sums where it is;
elsewhere a function of torch does, which makes several float32 tensors of the tile's size.

Shapes: N tokens, H hidden size, V vocabulary.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

KERNELS = "trl.kernels.chunked_logprob"
UTILITIES = "trl.trainer.utils"
FOLDS = ("_forward_tile", "_backward_tile")
PRODUCT = "_addmm_fp32"
CONFIGS = ("SFTConfig", "DPOConfig", "KTOConfig", "GRPOConfig", "RLOOConfig")
COLUMNS = 256  # of a tile that are converted to float32 at once
TILE = (4096, 32768)  # tokens and columns


@dataclass(frozen=True)
class FusedHead:
    """How `add_fused_lm_head` was called.

    Attributes:
        outputs: the per-token quantities that are computed.
        in_float32: whether the product is computed in float32.
    """

    outputs: tuple[str, ...] = ("log_probs", "entropy", "is_top1")
    in_float32: bool = False


def tile_bytes(tokens: int, element: int) -> int:
    """Return the bytes of the tile for so many tokens, with elements of that many bytes."""
    return min(tokens, TILE[0]) * TILE[1] * element


def of(model: "nn.Module") -> FusedHead | None:
    """Return the fused head that a trainer has added to `model`; None if it has none."""
    function = getattr(vars(model).get("forward"), "__func__", None)
    code = getattr(function, "__code__", None)
    if function is None or code is None:
        return None
    if "fused_lm_head" not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        return None
    enclosed = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    return FusedHead(tuple(enclosed.get("outputs", ())), bool(enclosed.get("cast_lm_head_to_fp32")))


def is_used_with(arguments: Any) -> bool:
    """Whether the trainer of these training arguments adds a fused head to its model."""
    names = {kind.__name__ for kind in type(arguments).__mro__ if kind.__module__.startswith("trl.")}
    return not names.isdisjoint(CONFIGS) and hasattr(sys.modules.get(UTILITIES), "add_fused_lm_head")


def add(model: "nn.Module", head: FusedHead) -> None:
    """Give `model`, a copy, a fused head of its own, in place of one that would run the original's `forward`."""
    vars(model).pop("forward", None)
    add_fused_lm_head = sys.modules[UTILITIES].add_fused_lm_head
    add_fused_lm_head(model, cast_lm_head_to_fp32=head.in_float32, outputs=head.outputs)


def ensure(model: "nn.Module") -> None:
    """Give `model`, a copy of one whose trainer is not there yet, the fused head that it will add."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and of(model) is None and hasattr(sys.modules.get(UTILITIES), "add_fused_lm_head"):
        add(model, FusedHead())


def renew(model: "nn.Module") -> None:
    """Give every module of `model`, a copy, whose original has a fused head, one of its own."""
    for module in model.modules():
        head = of(module)
        if head is not None and isinstance(vars(module)["forward"], MethodType):
            add(module, head)


def follow_triton(kernels: ModuleType, values: bool) -> Callable[[], None]:
    """Have `trl.kernels.chunked_logprob` take the memory that it takes with Triton; return a function that undoes it.

    Args:
        values: whether tensors have values. What folds a tile then runs on the tensors behind simulated ones, which
            nobody counts; otherwise nothing runs.
    """
    before = {name: getattr(kernels, name) for name in (*FOLDS, PRODUCT) if hasattr(kernels, name)}
    for name, function in before.items():
        setattr(kernels, name, add_product if name == PRODUCT else _uncounted(function) if values else _nothing)
    return lambda: vars(kernels).update(before)


def _uncounted(fold: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(fold)
    def folded(*arguments: Any, **options: Any) -> None:
        fold(*(getattr(argument, "raw", argument) for argument in arguments), **options)

    return folded


def _nothing(*_: Any, **__: Any) -> None:
    """Be a fold of a tile without values: the result is where the tile was."""


@contextlib.contextmanager
def folded_in_place() -> Iterator[None]:
    """Let tiles take the memory that they take with Triton in the body of the context, which runs on shapes."""
    kernels = sys.modules.get(KERNELS)
    undo = follow_triton(kernels, values=False) if kernels is not None else lambda: None
    try:
        yield
    finally:
        undo()


def add_product(total: "torch.Tensor", left: "torch.Tensor", right: "torch.Tensor") -> None:
    """Add `left` [N, K] @ `right` [K, M] to `total` [N, M] in float32, without float32 copies of all of both."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
        return
    for start in range(0, left.shape[1], COLUMNS):
        some = slice(start, start + COLUMNS)
        total.addmm_(left[:, some].float(), right[some].float())
