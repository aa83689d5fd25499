"""What operations take while they run, beyond arguments and results."""

import pytest
import torch

from balance_shim.memory.tracing.machine import traced, tracing
from balance_shim.memory.tracing.model_copy import copy_of


class Params4bit(torch.nn.Parameter):
    """Named as the packed weights of bitsandbytes are, by which they are known."""


class PackedLinear(torch.nn.Module):
    """A linear layer of 64 x 128 whose weight is packed."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 64, 128
        self.weight = Params4bit(torch.empty(64 * 128 // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        raise RuntimeError("no kernel")


def on_machine(machine, *shape, dtype=torch.bfloat16):
    return traced(torch.empty(shape, dtype=dtype, device="meta"), 0, machine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantized_layer_has_its_weight_in_full_while_it_multiplies(dtype):
    """Forward and backward, in bfloat16 and converted; nothing of it is kept, and types are those of the input."""
    model = torch.nn.Sequential(PackedLinear())
    weight = 64 * 128 * 2
    converted = 0 if dtype is torch.bfloat16 else 2 * weight
    with tracing(1) as machine:
        twin = copy_of(model, lambda _, tensor: traced(tensor.detach(), 0, machine))
        x = on_machine(machine, 10, 64, dtype=dtype).requires_grad_()
        machine.ledger.reset_peak(0)
        before = machine.ledger.live(0)
        out = twin(x)
        result = out.numel() * out.element_size()
        assert out.dtype is dtype and out.shape == (10, 128)
        assert machine.ledger.live(0) - before == _rounded(result)
        assert weight + converted <= machine.ledger.peak(0) - before <= weight + converted + 2 * _rounded(result)
        machine.ledger.reset_peak(0)
        before = machine.ledger.live(0)
        out.sum().backward()
        assert machine.ledger.peak(0) - before >= weight + converted
        assert twin[0].weight.grad is None and x.grad.shape == x.shape


def test_merging_pictures_counts_the_mask():
    """masked_scatter sums its mask up in int64, which its backward pass does for each dimension of what it selects."""
    with tracing(1) as machine:
        text = on_machine(machine, 1, 512, 64).requires_grad_()
        pictures = on_machine(machine, 128, 64).requires_grad_()
        mask = torch.zeros(1, 512, 64, dtype=torch.bool)
        mask[:, :128] = True
        mask = traced(mask, 0, machine)
        machine.ledger.reset_peak(0)
        before = machine.ledger.live(0)
        merged = text.masked_scatter(mask, pictures)
        assert machine.ledger.peak(0) - before == 512 * 64 * (2 + 8)
        assert machine.ledger.live(0) - before == 512 * 64 * 2
        machine.ledger.reset_peak(0)
        before = machine.ledger.live(0)
        merged.sum().backward()
        assert machine.ledger.peak(0) - before >= 128 * 64 * 3 * 8


def _rounded(size):
    return -(-size // 512) * 512
