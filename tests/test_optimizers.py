"""What optimizers keep and what their steps need: the table against real steps on traced tensors."""

import warnings

import pytest
import torch
from transformers import optimization

from balance_shim.memory.tracing.machine import traced, tracing
from balance_shim.optimizers import OPTIMIZERS, optimizer_named

# As the Trainer makes them. Taking all tensors at once is torch's choice on accelerators, but not on the `cpu` of a
# trace.
MADE = {
    "adamw_torch": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "adamw_torch_fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, foreach=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-3, foreach=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, foreach=True),
    "adafactor": lambda parameters: optimization.Adafactor(
        parameters, lr=1e-3, scale_parameter=False, relative_step=False
    ),
}
if hasattr(optimization, "AdamW"):  # transformers up to 4.49
    MADE["adamw_hf"] = lambda parameters: optimization.AdamW(parameters, no_deprecation_warning=True)
SHAPES = {
    "one matrix": [(1024, 1024)],
    "a layer": [(1024, 512), (1024, 512), (512, 1024), (1024,)],
    "vectors": [(2**19,)],
    "one large, many small": [(4096, 512), *[(64, 64)] * 20],
}
ROUNDING = 512  # bytes, of each tensor


def measured(make, shapes, dtype):
    """Return (parameters, bytes of state, most bytes that the second step adds) of an optimizer on traced tensors."""
    with tracing(1) as machine:
        parameters = [
            torch.nn.Parameter(traced(torch.empty(shape, dtype=dtype, device="meta"), 0, machine)) for shape in shapes
        ]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        before = machine.ledger.live(0)
        optimizer = make(parameters)
        optimizer.step()
        held = machine.ledger.live(0)
        machine.ledger.reset_peak(0)
        optimizer.step()
        return [parameter.raw for parameter in parameters], held - before, machine.ledger.peak(0) - held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", MADE)
def test_the_table_says_what_a_step_shows(name, shapes, dtype):
    """State and temporaries of each optimizer that can be had here are those of a real step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some names of the functions that Adafactor uses are deprecated
        parameters, state, step = measured(MADE[name], SHAPES[shapes], dtype)
    slack = 4 * ROUNDING * len(parameters)
    assert OPTIMIZERS[name].state_bytes(parameters) == pytest.approx(state, abs=slack)
    assert OPTIMIZERS[name].step_bytes(parameters) == pytest.approx(step, rel=0.01, abs=slack)


def test_an_optimizer_without_state_is_not_measured_as_one_with():
    """The measurement itself sees state: twice the parameters for AdamW, nothing for SGD."""
    parameters, state, _ = measured(MADE["adamw_torch"], SHAPES["one matrix"], torch.float32)
    assert state == 2 * parameters[0].nbytes
    assert measured(MADE["sgd"], SHAPES["one matrix"], torch.float32)[1] == 0


def test_eight_bits_are_a_byte_a_value_and_scales():
    """8-bit AdamW keeps two values of a byte each, with the scales of their blocks; paged ones keep nothing here."""
    parameters = [torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta")]
    assert optimizer_named("adamw_bnb_8bit").state_bytes(parameters) == pytest.approx(2 * 2**20, rel=0.05)
    assert optimizer_named("paged_adamw_8bit").state_bytes(parameters) == 0
    assert optimizer_named("lion_32bit").state_bytes(parameters) == 4 * 2**20


def test_an_unknown_optimizer_counts_as_adam():
    """What nobody knows is taken for the default, the largest of the common ones; nothing trains, nothing is kept."""
    assert optimizer_named("an_optimizer_of_tomorrow") is OPTIMIZERS["adamw_torch"]
    assert all(optimizer.state_bytes([]) == optimizer.step_bytes([]) == 0 for optimizer in OPTIMIZERS.values())
