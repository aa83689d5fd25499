"""Which kernel attention runs on which device, and what the plain products keep."""

import pytest
import torch
import transformers

from balance_shim.device_rules.attention import AttentionCall, EnabledKernels, kernel_for
from balance_shim.device_rules.kinds import Architecture
from balance_shim.memory.tracing.machine import traced, tracing, tracing_for
from balance_shim.virtual.grouped_attention import MODULE, NAME, around_use_gqa, repeating_helps
from balance_shim.virtual.math_attention import math_attention

T4, V100, A100, RTX3090, H100, B200 = (
    Architecture("cuda", capability) for capability in ((7, 5), (7, 0), (8, 0), (8, 6), (9, 0), (10, 0))
)
MI300X, NAVI21 = Architecture("hip", (9, 4)), Architecture("hip", (10, 3))
NPU = Architecture("npu", None)
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
EQUAL, GROUPED = {"query_heads": 28, "key_heads": 28}, {"query_heads": 28, "key_heads": 4, "enable_gqa": True}
HEADS_128 = {"width": 128, "value_width": 128}


@pytest.mark.parametrize(
    ("architecture", "dtype", "changes", "kernel"),
    [
        # Flash and cuDNN take half types from 8.0 on, the efficient kernel takes float32 but no grouped queries.
        (A100, BFLOAT, EQUAL, "flash"), (A100, BFLOAT, GROUPED, "flash"), (H100, HALF, GROUPED, "flash"),
        (B200, BFLOAT, GROUPED, "flash"), (H100, FLOAT, EQUAL, "efficient"), (H100, FLOAT, GROUPED, "math"),
        (T4, HALF, EQUAL, "efficient"), (T4, HALF, GROUPED, "math"), (V100, HALF, GROUPED, "math"),
        (T4, BFLOAT, EQUAL, "math"), (V100, FLOAT, EQUAL, "efficient"), (T4, FLOAT, GROUPED, "math"),
        # `enable_gqa` with as many heads is no grouping.
        (H100, FLOAT, {**EQUAL, "enable_gqa": True}, "efficient"),
        # Flash takes no mask.
        (A100, BFLOAT, {**EQUAL, "has_mask": True}, "cudnn"),
        (A100, BFLOAT, {**EQUAL, "has_mask": True, "width": 256, "value_width": 256}, "efficient"),
        (H100, FLOAT, {**EQUAL, "has_mask": True}, "efficient"), (T4, HALF, {**EQUAL, "has_mask": True}, "efficient"),
        # Widths: flash to 256 and alike, the efficient kernel any that fill 16 bytes.
        (A100, BFLOAT, {**EQUAL, "width": 192}, "efficient"),
        (A100, BFLOAT, {**EQUAL, "width": 512, "value_width": 512}, "efficient"),
        (A100, BFLOAT, {**GROUPED, "width": 512, "value_width": 512}, "math"),
        (A100, FLOAT, {**EQUAL, "width": 66, "value_width": 66}, "math"),
        (A100, BFLOAT, {**EQUAL, "width": 66, "value_width": 66}, "flash"),
        (V100, FLOAT, {**EQUAL, "width": 66, "value_width": 66}, "efficient"),
        # Small shared memory: no training of heads between 193 and 224, and no dropout above.
        (RTX3090, BFLOAT, {**GROUPED, "width": 208, "value_width": 208}, "math"),
        (A100, BFLOAT, {**GROUPED, "width": 208, "value_width": 208}, "flash"),
        (RTX3090, BFLOAT, {**GROUPED, "width": 256, "value_width": 256}, "flash"),
        (RTX3090, BFLOAT, {**GROUPED, "width": 256, "value_width": 256, "dropout": 0.1}, "math"),
        (RTX3090, BFLOAT, {**GROUPED, "width": 208, "value_width": 208, "requires_grad": False}, "flash"),
        # All fused kernels want four dimensions.
        (T4, HALF, {**EQUAL, "dimensions": 3}, "math"), (A100, BFLOAT, {**EQUAL, "dimensions": 3}, "math"),
        # ROCm by the family; of others nothing is known.
        (MI300X, BFLOAT, GROUPED, "flash"), (MI300X, FLOAT, GROUPED, "math"), (MI300X, FLOAT, EQUAL, "efficient"),
        (NAVI21, BFLOAT, EQUAL, "math"), (NPU, FLOAT, GROUPED, "flash"),
    ],
)  # fmt: skip
def test_the_rule_is_that_of_torch(architecture, dtype, changes, kernel):
    """Cases of sdp_utils.cpp, by type, compute capability, heads, mask, width, dropout and gradients."""
    assert kernel_for(AttentionCall(dtype=dtype, **{**HEADS_128, **changes}), architecture) == kernel


def test_switched_off_kernels_are_not_chosen():
    """`torch.backends.cuda.enable_flash_sdp(False)` and its like count."""
    call = AttentionCall(dtype=BFLOAT, **HEADS_128, **GROUPED)
    assert kernel_for(call, A100, EnabledKernels(flash=False)) == "cudnn"
    assert kernel_for(call, A100, EnabledKernels(flash=False, cudnn=False)) == "math"
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert EnabledKernels.now() == EnabledKernels(flash=False)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("changes", [{}, {"is_causal": True}, {"mask": True}, {"scale": -0.3}, {"enable_gqa": True}])
def test_plain_products_compute_what_torch_computes(dtype, changes):
    """Values and gradients are those of torch's own function, rows that a mask closes altogether included."""
    torch.manual_seed(0)
    heads = 2 if changes.get("enable_gqa") else 6
    shapes = [(2, 6, 8, 16), (2, heads, 8, 16), (2, heads, 8, 16)]
    mask = torch.zeros(8, 8, dtype=dtype)
    mask[3], mask[0, 1:] = float("-inf"), float("-inf")
    given = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False, **changes}
    given["mask"] = mask if given["mask"] else None
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    reference_inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = math_attention(*inputs, dropout_p=0.0, **given)
    named = {name: value for name, value in given.items() if name != "mask"}
    expected = torch.ops.aten._scaled_dot_product_attention_math(*reference_inputs, given["mask"], **named)[0]
    torch.testing.assert_close(out, expected)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    for tensor, reference in zip(inputs, reference_inputs, strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad)


def bytes_kept_by(architectures, dtype, keys):
    """Return the bytes that attention of 8 heads, `keys` of them with keys, keeps in a trace for `architectures`."""
    with tracing_for(architectures) as target, tracing(1) as machine:
        query, key, value = (
            traced(torch.empty(1, heads, 64, 16, dtype=dtype, device="meta"), 0, machine).requires_grad_()
            for heads in (8, keys, keys)
        )
        before = machine.ledger.live(0)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=keys < 8)
        return machine.ledger.live(0) - before, out.shape, len(target.math_attention)


def test_traces_keep_what_the_kernels_of_the_devices_keep():
    """S x S in float32 for grouped queries that no fused kernel takes; of several devices the costliest counts."""
    fused = 8 * 64 * (16 * 2 + 4)  # output, and one float32 a row
    wide = 8 * 64 * 16 * 4  # queries, keys or values, of all heads, in float32
    plain = 8 * 64 * 64 * 4 + 3 * wide + 8 * 64 * 16 * 2  # probabilities, operands, output
    assert bytes_kept_by([A100], BFLOAT, 2) == (fused, (1, 8, 64, 16), 0)
    assert bytes_kept_by([T4], BFLOAT, 2) == (plain, (1, 8, 64, 16), 1)
    assert bytes_kept_by([A100, T4], BFLOAT, 2)[0] == plain and bytes_kept_by([A100, H100], HALF, 2)[0] == fused


def test_repeated_keys_help_where_the_efficient_kernel_takes_them():
    """float32 anywhere and float16 before 8.0: yes. Half types need it not later, bfloat16 has no kernel before."""

    def helps(dtype, *architectures):
        return repeating_helps(dtype, 128, 128, True, architectures)

    assert helps(FLOAT, H100) and helps(FLOAT, T4) and helps(HALF, T4) and helps(FLOAT, MI300X)
    assert not (helps(BFLOAT, H100) or helps(BFLOAT, T4) or helps(FLOAT, NPU) or helps(FLOAT))
    assert helps(HALF, A100, T4) and not repeating_helps(FLOAT, 66, 66, True, (A100,))


def test_the_question_of_transformers_is_answered(monkeypatch):
    """Only for calls that concern us, without a mask, and unless the user insists; otherwise the library's answer."""
    concerned, seen = [True], []
    use_gqa = around_use_gqa(
        lambda mask, key, *rest: True, lambda key: concerned[0], lambda key: seen.append(key.shape)
    )
    with tracing_for([H100]), tracing(1) as machine:
        key = traced(torch.empty(1, 2, 64, 16, device="meta"), 0, machine)
        half = traced(torch.empty(1, 2, 64, 16, dtype=BFLOAT, device="meta"), 0, machine)
        assert use_gqa(None, key) is False and use_gqa(None, key, key) is False and len(seen) == 2
        assert use_gqa(None, half) is True and use_gqa(half, key) is True
        with torch.autocast("cpu", dtype=BFLOAT):  # attention then runs in the lower type
            assert use_gqa(None, key) is True
        monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "1")
        assert use_gqa(None, key) is True
        monkeypatch.delenv("TRANSFORMERS_SDPA_FORCE_GQA")
        concerned[0] = False
        assert use_gqa(None, key) is True and len(seen) == 2


def test_transformers_still_asks():
    """The function that the shim answers is there from 4.54 on, with the mask and the key first."""
    import inspect

    module = pytest.importorskip(MODULE)
    if not hasattr(module, NAME):
        assert tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 54)
        return
    assert list(inspect.signature(getattr(module, NAME)).parameters)[:2] == ["attention_mask", "key"]
