"""What of a model moves: which tensors are one piece of memory."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from balance_shim.placement import movable_pieces


def test_wrappers_are_never_taken_for_one_tensor():
    """Quantized weights of torchao's kind have no memory of their own: their address reads 0, for all of them."""
    first, second = (TwoTensor(torch.ones(2, 2), torch.ones(2, 2)) for _ in range(2))
    assert first.data_ptr() == second.data_ptr() == 0
    assert movable_pieces._memory(first) != movable_pieces._memory(second)
    assert movable_pieces._memory(first) == movable_pieces._memory(first)


def test_ties_are_one_piece_of_memory():
    """Views of all of a tensor are the tensor; equal tensors are two."""
    weight = torch.ones(2, 2)
    assert (
        movable_pieces._memory(weight)
        == movable_pieces._memory(weight.view(2, 2))
        == movable_pieces._memory(weight.detach())
    )
    assert movable_pieces._memory(weight) != movable_pieces._memory(torch.ones(2, 2))


def test_state_in_wrappers_is_refused(monkeypatch):
    """Optimizers with 8-bit state of torchao: it cannot change its memory in place, so nothing moves."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["exp_avg"] = TwoTensor(torch.ones(2, 2), torch.ones(2, 2))

    class Elsewhere:
        def device_of(self, name):
            return torch.device("meta")

        def block_of(self, name):
            return ""

    with pytest.raises(movable_pieces.MoveError, match="are TwoTensor, which wraps tensors of its own"):
        movable_pieces.to_move(model, Elsewhere(), [optimizer])
