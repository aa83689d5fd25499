"""Tensors that look like copies of parameters."""

import torch

from balance_shim.monitoring import leak_search


def test_a_batch_of_the_shape_of_a_classifier_is_no_copy_of_it():
    """Copies are found in any floating-point type; token ids of the same shape are not taken for one."""
    model = torch.nn.Linear(61, 3)
    tokens = torch.zeros(3, 61, dtype=torch.int64)
    average = model.weight.detach().to(torch.bfloat16)
    twins = leak_search.twins("cpu", model, None)
    assert any(twin is average for twin in twins) and not any(twin is tokens for twin in twins)
