"""What tests of tracing ask for: the blocks and costs of a model, and that nothing has changed."""

import random
from contextlib import contextmanager

import numpy
import torch

from balance_shim.memory.profile import profile
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from tests import models

WORKLOAD = Workload(batch_size=2, seq_len=64)
HIDDEN = WORKLOAD.tokens * models.SIZES["hidden_size"] * 4  # bytes
TEXT = {**models.SIZES, "num_key_value_heads": 2}


def profiled(model, workload=WORKLOAD, **options):
    """Return (blocks, profile) as the planner asks for it."""
    case = TrainingCase.of(model, workload, **options)
    return case.structure.blocks, profile(case)


def costs_of(model, workload=WORKLOAD, **options):
    blocks, block_profile = profiled(model, workload, **options)
    assert block_profile.method == "traced"
    return dict(zip((block.name for block in blocks), block_profile.costs, strict=True))


def total(costs, term):
    return sum(getattr(cost, term) for cost in costs.values())


@contextmanager
def nothing_changes(model):
    """Fail if what is within changes `model` or torch."""

    def state():
        functions = torch.nn.functional
        return (
            [
                (name, id(parameter), parameter.is_meta, parameter.requires_grad)
                for name, parameter in model.named_parameters()
            ],
            [(name, id(buffer)) for name, buffer in model.named_buffers()],
            [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
            [
                len(hooks)
                for module in model.modules()
                for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            ],
            (functions.scaled_dot_product_attention, functions.dropout, torch.tensor),
            (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
            torch.get_rng_state().tolist(),
            (random.getstate(), numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2]),
            getattr(getattr(model, "config", None), "use_cache", None),
        )

    before = state()
    yield
    assert state() == before
