"""Mixed precision: which operations `torch.autocast` runs in which type.

For a backend written in Python torch brings the switch but no rules. These are the rules of CUDA, after the lists in
torch's documentation of automatic mixed precision, limited to operations that the simulation may meet in training.
"""

import torch

from .tensor import BACKEND, SimulatedTensor

_LOWER = (
    "linear", "matmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv", "addr", "chain_matmul",
    "linalg_multi_dot", "linalg_vecdot", "einsum", "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "prelu", "scaled_dot_product_attention", "lstm_cell",
    "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
)  # fmt: skip

_SINGLE = (
    "acos", "asin", "cosh", "tan", "sinh", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "reciprocal",
    "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "group_norm",
    "native_layer_norm", "rms_norm", "norm.Scalar", "norm.ScalarOpt_dim", "cosine_similarity", "cosine_embedding_loss",
    "nll_loss", "nll_loss_nd", "cross_entropy_loss", "kl_div", "l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss",
    "hinge_embedding_loss", "margin_ranking_loss", "poisson_nll_loss", "triplet_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp",
)  # fmt: skip

# These take the type they should compute in as an argument, which is set unless the caller has.
_SINGLE_BY_ARGUMENT = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "prod", "prod.dim_int", "cumsum",
                       "cumprod")  # fmt: skip

_WIDEST = ("addcdiv", "addcmul", "atan2", "bilinear", "cat", "cross", "dot", "vdot", "grid_sampler", "index_put",
           "scatter_add", "stack", "tensordot")  # fmt: skip

_KEY = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastPrivateUse1"))


class _CastWeights:
    """Weights in the lower type, kept until autocast ends, because a weight is used again in the same forward."""

    def __init__(self):
        self._found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight = tensor.requires_grad and tensor.is_leaf and tensor.dtype is torch.float32
        if not (weight and torch.is_autocast_cache_enabled() and torch.is_grad_enabled()):
            return tensor.to(dtype)
        entry = self._found.get(id(tensor))
        if entry is None or entry[1].dtype is not dtype:
            entry = self._found[id(tensor)] = (tensor, tensor.to(dtype))
        return entry[1]

    def clear(self) -> None:
        self._found.clear()


def register() -> "tuple[list[torch.library.Library], _CastWeights]":
    """Register the rules, for as long as the returned libraries live; autocast's end must clear the weights."""
    weights = _CastWeights()
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL")
    for names, make in ((_LOWER, _lower), (_SINGLE, _single), (_SINGLE_BY_ARGUMENT, _by_argument), (_WIDEST, _widest)):
        for name in names:
            packet, _, overload = name.partition(".")
            func = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if func is not None:  # lists differ a little between versions of torch
                library.impl(name, make(func, weights), "AutocastPrivateUse1")
    return [everything, library], weights


def _lower(func, weights):
    def kernel(*args, **kwargs):
        dtype = torch.get_autocast_dtype(BACKEND)
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            return func(*_each(args, dtype, weights.cast), **_each(kwargs, dtype, weights.cast))

    return kernel


def _single(func, _):
    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            return func(*_each(args, torch.float32, torch.Tensor.to), **_each(kwargs, torch.float32, torch.Tensor.to))

    return kernel


def _by_argument(func, _):
    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            if _castable(args[0]) and kwargs.get("dtype") is None and len(args) < len(func._schema.arguments):
                kwargs["dtype"] = torch.float32
            return func(*args, **kwargs)

    return kernel


def _widest(func, _):
    def kernel(*args, **kwargs):
        types: set = set()
        _each(args, None, lambda tensor, _: types.add(tensor.dtype))
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            if len(types) < 2:
                return func(*args, **kwargs)
            widest = torch.float32 if torch.float32 in types else types.pop()
            return func(*_each(args, widest, torch.Tensor.to), **_each(kwargs, widest, torch.Tensor.to))

    return kernel


def _castable(value):
    return type(value) is SimulatedTensor and value.is_floating_point() and value.dtype is not torch.float64


def _each(value, dtype, cast):
    if _castable(value):
        return cast(value, dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(item, dtype, cast) for item in value)
    if isinstance(value, dict):
        return {name: _each(item, dtype, cast) for name, item in value.items()}
    return value
