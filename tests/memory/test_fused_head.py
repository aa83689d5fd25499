"""TRL's fused head: how it is recognised, copied and traced, and that simulated devices keep its values."""

import pytest
import torch

from balance_shim.memory.cost import TRACED
from balance_shim.memory.profile import profile
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.upstream import fused_head
from balance_shim.versions import version_of
from tests import models

try:
    import trl.trainer.utils as utilities
    from trl.kernels import chunked_logprob as kernels
except ImportError:
    pytest.skip("TRL before 1.16 has no fused heads", allow_module_level=True)

HEAD = fused_head.FusedHead(("log_probs", "entropy"), False)


def with_head():
    model = models.llama()
    utilities.add_fused_lm_head(model, outputs=HEAD.outputs)
    return model


def test_what_is_relied_on_is_there():
    """The functions that are replaced, the size of a tile, and the trainers' arguments that bring a fused head."""
    assert all(callable(getattr(kernels, name)) for name in (*fused_head.FOLDS, fused_head.PRODUCT))
    assert (kernels.TOKEN_CHUNK_SIZE, utilities._CHUNKED_LOGPROB_CHUNK_SIZE) == fused_head.TILE
    import trl

    assert all(hasattr(trl, name) for name in fused_head.CONFIGS) and version_of("trl") >= (1, 16)


def test_a_fused_head_is_recognised_with_its_outputs():
    """By the `forward` that the model has, and not in a model as it is loaded."""
    assert fused_head.of(with_head()) == HEAD
    assert fused_head.of(models.llama()) is None


@pytest.mark.parametrize("make", [models.llama, with_head])
def test_the_tile_and_the_sums_are_planned_for(make):
    """Of a head that trains: a tile of 32,768 columns, the float32 gradient of the weight, and no logits."""
    workload = Workload(batch_size=2, seq_len=64, loss="fused")
    model = make()
    costed = profile(TrainingCase.of(model, workload))
    tile = fused_head.tile_bytes(126, 4)  # one token a row has no label
    weight = model.lm_head.weight.numel() * 4
    assert costed.method == TRACED
    assert tile <= max(cost.backward for cost in costed.costs) <= tile + 3 * weight
    assert all(parameter.grad is None for parameter in model.parameters()), "the original has not run"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_by_pieces_is_the_product(dtype):
    """Whatever the width, which need be no multiple of a piece."""
    left, right = torch.randn(5, 700).to(dtype), torch.randn(700, 3).to(dtype)
    total = torch.ones(5, 3)
    fused_head.add_product(total, left, right)
    torch.testing.assert_close(total, 1 + left.float() @ right.float(), rtol=1e-5, atol=1e-4)


def test_replaced_functions_come_back():
    """After a trace TRL's kernels are its own."""
    before = {name: getattr(kernels, name) for name in (*fused_head.FOLDS, fused_head.PRODUCT)}
    with fused_head.folded_in_place():
        assert all(getattr(kernels, name) is not function for name, function in before.items())
    assert all(getattr(kernels, name) is function for name, function in before.items())
