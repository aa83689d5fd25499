"""Results of meta kernels are remembered by shape, and are those that the kernels give."""

import pytest
import torch

from balance_shim.virtual import shape_memo

aten = torch.ops.aten


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def described(out):
    if isinstance(out, torch.Tensor):
        return out.shape, out.stride(), out.dtype, out.device, out.storage_offset(), out.untyped_storage().nbytes()
    return [described(tensor) for tensor in out] if isinstance(out, (list, tuple)) else out


@pytest.fixture
def calls(monkeypatch):
    """The operations that really ran, in order; nothing is remembered from before."""
    ran = []
    monkeypatch.setattr(shape_memo, "_results", {})

    def counted(func):
        class Counted:
            _schema = func._schema

            def __call__(self, *args, **kwargs):
                ran.append(func)
                return func(*args, **kwargs)

        return Counted()

    return ran, counted


CASES = {
    "mul": (aten.mul.Tensor, (meta(2, 3, 4), meta(4)), {}),
    "whole by real number": (aten.mul.Tensor, (meta(2, 3, dtype=torch.int64), 2.0), {}),
    "whole by whole number": (aten.mul.Tensor, (meta(2, 3, dtype=torch.int64), 2), {}),
    "quotient of whole numbers": (aten.div.Tensor, (meta(2, 3, dtype=torch.int64), 2), {}),
    "transposed": (aten.add.Tensor, (meta(3, 2).t(), meta(3, 2).t()), {}),
    "cat": (aten.cat.default, ([meta(2, 3), meta(2, 5)], -1), {}),
    "layer norm": (aten.native_layer_norm.default, (meta(2, 3, 4), [4], meta(4), meta(4), 1e-5), {}),
    "softmax": (aten._log_softmax.default, (meta(2, 3, dtype=torch.float16), -1, True), {}),
    "keyword": (aten._to_copy.default, (meta(2, 3),), {"dtype": torch.float16}),
    "none": (aten.native_layer_norm.default, (meta(2, 4), [4], None, None, 1e-5), {}),
    "random": (aten.native_dropout.default, (meta(2, 4), 0.1, True), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_second_call_gives_what_the_kernel_gives(name, calls):
    """Shape, strides, type and size of storage are the kernel's, in storages of their own, and it runs once."""
    ran, counted = calls
    func, args, kwargs = CASES[name]
    operation = counted(func)
    first, second = (shape_memo.call(operation, args, kwargs) for _ in range(2))
    assert described(second) == described(first) == described(func(*args, **kwargs))
    assert ran == [func] and second is not first
    tensors = [
        tensor for tensor in (second if isinstance(second, tuple) else [second]) if isinstance(tensor, torch.Tensor)
    ]
    assert len({tensor.untyped_storage()._cdata for tensor in tensors}) == len(tensors)


def test_numbers_that_are_equal_are_not_the_same(calls):
    """True, 1 and 1.0 promote types in different ways; so does the default dtype."""
    _, counted = calls
    add, div = counted(aten.add.Tensor), counted(aten.div.Tensor)
    flags = meta(3, dtype=torch.bool)
    assert [shape_memo.call(add, (flags, number), {}).dtype for number in (1, 1.0)] == [torch.int64, torch.float32]
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            assert shape_memo.call(div, (flags, 2), {}).dtype == dtype
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("func", "args"),
    [(aten.add_.Tensor, (meta(3), meta(3))), (aten.view.default, (meta(2, 3), [6])),
     (aten._unsafe_view.default, (meta(2, 3), [6])), (aten.add.Tensor, (torch.ones(3), torch.ones(3)))],
    ids=["in place", "view", "view that does not say so", "numbers"],
)  # fmt: skip
def test_what_writes_shares_or_computes_always_runs(func, args, calls):
    """An argument that is written to is the result; a view keeps its storage; and numbers are computed."""
    ran, counted = calls
    operation = counted(func)
    for _ in range(2):
        result = shape_memo.call(operation, args, {})
        if args[0].is_meta:
            assert result.untyped_storage()._cdata == args[0].untyped_storage()._cdata
        else:
            assert result.tolist() == [2.0] * 3
    assert ran == [func, func]
