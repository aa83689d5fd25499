"""Norm and head under a kernel that computes head and loss together."""

from types import MethodType, SimpleNamespace

import pytest

from balance_shim.memory.colocation import NO_CONSTRAINTS
from balance_shim.memory.structure import structure_of
from balance_shim.placement.fused_head import constraints_for
from tests import models


def lce_forward(self, *_, **__):
    raise NotImplementedError


@pytest.mark.parametrize("bound_to", ["instance", "class", "wrapped"])
def test_ligers_forward_is_known_wherever_it_is_bound(monkeypatch, bound_to):
    """To the model, to its class, or under accelerate's wrapper: what is behind the layers has one device."""
    monkeypatch.setattr(lce_forward, "__module__", "liger_kernel.transformers.model.llama")
    model = models.llama()
    if bound_to == "class":
        monkeypatch.setattr(type(model), "forward", lce_forward)
    else:
        vars(model)["forward" if bound_to == "instance" else "_old_forward"] = MethodType(lce_forward, model)
    assert constraints_for(model, structure_of(model), None).groups == (frozenset({"model.norm", "lm_head"}),)


def test_the_trainers_argument_counts_before_anything_is_bound():
    """The Trainer binds Liger's forward when training begins; other models and functions are left alone."""
    model = models.llama()
    assert constraints_for(model, structure_of(model), SimpleNamespace(use_liger_kernel=True)).groups
    model.forward = MethodType(lce_forward, model)  # of the script's own, in this module
    assert constraints_for(model, structure_of(model), SimpleNamespace(use_liger_kernel=False)) == NO_CONSTRAINTS
