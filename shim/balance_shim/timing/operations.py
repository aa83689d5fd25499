"""The cost of ATen operations, from the shapes of their inputs and outputs.

FLOPs are those of `torch.utils.flop_counter`; bytes are those of the inputs and outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .rates import Caller, Operation, Precision

aten = torch.ops.aten
NOTHING: dict[Caller, Operation] = {
    caller: Operation(launches=0, caller=caller) for caller in ("python", "engine", "recomputing")
}

_PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float32",
}  # fmt: skip
_EIGHT_BIT: Precision = "bfloat16"  # of products in eight bits; they are rare, and no slower than those in sixteen

# They read as many elements as they return, not all of their first argument.
_GATHERING = {
    aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default,
    aten.slice_backward.default, aten.select_backward.default,
}  # fmt: skip
# They write without reading.
_FILLING = ("fill_", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
            "new_full", "arange", "normal_", "uniform_", "bernoulli_")  # fmt: skip
_EMPTY = ("empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "detach", "alias", "_unsafe_view",
          "_reshape_alias", "lift_fresh", "set_", "resize_")  # fmt: skip
# The host waits for their result, or for the size of it.
_AWAITED = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
            "unique_consecutive")  # fmt: skip
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Rule(NamedTuple):
    """The facts that the cost of an operation depends on.

    Attributes:
        is_free: whether it starts no kernel.
        is_awaited: whether the host waits for it.
        gathers, fills: which of its inputs it does not read in full.
        copies: whether it copies one tensor, which may be from device to device.
        writes: whether it writes to its first argument, or to each tensor of a list that this is.
        by_mask: whether the host waits for it where it is given a mask.
        flops: (arguments, output) -> FLOPs; None for an operation without matrix products.
    """

    is_free: bool
    is_awaited: bool
    gathers: bool
    fills: bool
    copies: bool
    writes: bool
    by_mask: bool
    flops: Callable[[Sequence[Any], Any], int] | None


_rules: dict[Any, Rule] = {}


def rule_of(func: torch._ops.OpOverload) -> Rule:
    """Return the rule for an operation."""
    rule = _rules.get(func)
    if rule is None:
        rule = _rules[func] = _rule(func)
    return rule


def cost_of(func: torch._ops.OpOverload, args: Sequence[Any], out: Any) -> Operation:
    """Return the cost of an operation that has run.

    Args:
        args: its arguments, plain tensors or those of the meta device.
        out: what it returned.
    """
    rule = rule_of(func)
    if rule.is_free:
        return NOTHING[caller_now()]
    caller = caller_now()
    written = size_of(out)
    if rule.writes and out is None:
        written = size_of(args[0])
    if rule.gathers or rule.copies:
        moved = 2 * written
    elif rule.fills:
        moved = written
    else:
        moved = written + size_of(args)
    if rule.flops is None:
        return Operation(0, moved, "float32", 1, caller)
    return Operation(rule.flops(args, out), moved, _precision(args), 1, caller)


def caller_now() -> Caller:
    """Return who runs operations at this moment: the engine's nodes run without gradients, unless they recompute."""
    if torch._C._current_autograd_node() is None:
        return "python"
    return "recomputing" if torch.is_grad_enabled() else "engine"


def attention_cost(query: Any, key: Any, value: Any, mask: Any, backward: bool) -> Operation:
    """Return the cost of a fused attention kernel, forward or backward; shapes (B, H, S, D)."""
    sequences = query.numel() // max(1, query.shape[-1])
    width, value_width = query.shape[-1], value.shape[-1]
    columns = key.shape[-2]
    # torch.utils.flop_counter: sdpa_flop_count and sdpa_backward_flop_count
    products = 3 * width + 2 * value_width if backward else width + value_width
    tensors = size_of((query, key, value, mask))
    moved = 2 * tensors + size_of(query) if backward else tensors + size_of(query)
    return Operation(2 * sequences * columns * products, moved, _precision((query,)), caller=caller_now())


def crossing(
    func: torch._ops.OpOverload, args: Sequence[Any], place: int | None, virtual: Sequence[Any]
) -> tuple[int | None, int | None]:
    """Return source and target of a copy, None for the host; twice the same for one that stays where it is.

    Args:
        args: its arguments, as they are inside.
        place: of its result.
        virtual: the virtual tensors among the arguments, each with `raw` and `place`.
    """
    name = func._schema.name
    if name == "aten::copy_":  # (target, source)
        target, source = args[0], args[1]
    elif name == "aten::_copy_from":
        source, target = args[0], args[1]
    else:  # the target is made
        return (virtual[0].place if virtual else None), place
    places = {id(tensor.raw): tensor.place for tensor in virtual}
    return places.get(id(source)), places.get(id(target))


def waits(func: torch._ops.OpOverload, args: Sequence[Any]) -> bool:
    """Return whether the host waits for this operation's result."""
    rule = rule_of(func)
    if not rule.by_mask:
        return rule.is_awaited
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def size_of(value: Any) -> int:
    """Return the bytes of all tensors in `value`."""
    kind = type(value)
    if kind is torch.Tensor:
        size: int = value.nbytes
        return size
    if kind is list or kind is tuple:
        total = 0
        for item in value:
            total += size_of(item)
        return total
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def _rule(func: torch._ops.OpOverload) -> Rule:
    name = func._schema.name.removeprefix("aten::")
    # An output that aliases an input without writing to it is a view.
    is_view = any(output.alias_info is not None and not output.alias_info.is_write for output in func._schema.returns)
    return Rule(
        is_free=is_view or name in _EMPTY,
        is_awaited=name in _AWAITED,
        gathers=func in _GATHERING,
        fills=name in _FILLING,
        copies=name in ("copy_", "_to_copy", "_copy_from", "clone"),
        writes=func._schema.is_mutable,
        by_mask=name in _INDEXING,
        flops=_flops(func),
    )


def _flops(func: torch._ops.OpOverload) -> Callable[[Sequence[Any], Any], int] | None:
    from torch.utils.flop_counter import flop_registry

    packet = func._overloadpacket
    if packet in (aten.mm, aten.bmm):
        return lambda args, out: 2 * int(out.numel()) * int(args[0].shape[-1])
    if packet in (aten.addmm, aten.baddbmm):
        return lambda args, out: 2 * int(out.numel()) * int(args[1].shape[-1])
    if func._schema.name == "aten::_grouped_mm":
        return _grouped_flops
    formula = flop_registry.get(packet)
    if formula is None:
        return None
    return lambda args, out: int(formula(*args, out_val=out))


def _grouped_flops(args: Sequence[Any], out: Any) -> int:
    left, right = args[0], args[1]
    if left.dim() == 2 and right.dim() == 2:  # every group has its own part of what is summed over
        return 2 * int(left.numel()) * int(right.shape[-1])
    return 2 * int(out.numel()) * int(left.shape[-1])


def _precision(args: Sequence[Any]) -> Precision:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return _PRECISIONS.get(arg.dtype, _EIGHT_BIT)
    return "float32"
