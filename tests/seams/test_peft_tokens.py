"""Trainable tokens start from values of a weight that is whole, in every version of PEFT."""

import types
from contextlib import contextmanager

import torch

from balance_shim import modes
from balance_shim.modes.base import Mode
from balance_shim.patching import registry
from balance_shim.seams import peft_tokens


class Partitioned(Mode):
    """A mode whose weights have no elements until they are gathered."""

    def __init__(self, whole):
        self.whole = whole

    @contextmanager
    def reading_weight(self, weight):
        weight.data = self.whole
        yield
        weight.data = self.whole[:0]


def test_layers_that_index_the_weight_themselves_find_it_whole(monkeypatch):
    """As PEFT before 0.16 does, which has no `_collect_token_weights`; afterwards the weight is partitioned again."""

    class TrainableTokensLayer(torch.nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def get_base_layer(self):
            return self.base_layer

        def update_layer(self, adapter_name, **kwargs):
            self.values = self.get_base_layer().weight[kwargs["token_indices"]].detach().clone()

    embedding = torch.nn.Embedding(8, 4)
    whole = embedding.weight.data
    embedding.weight.data = whole[:0]
    monkeypatch.setattr(modes, "current", lambda: Partitioned(whole))
    layer = TrainableTokensLayer(embedding)
    before = registry.patches()
    peft_tokens.apply(types.SimpleNamespace(TrainableTokensLayer=TrainableTokensLayer))
    try:
        layer.update_layer("default", token_indices=[5, 6])
    finally:
        registry.restore(tuple(patch for patch in registry.patches() if patch not in before))
    assert torch.equal(layer.values, whole[[5, 6]]) and not embedding.weight.numel()
