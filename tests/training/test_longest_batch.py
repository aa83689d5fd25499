"""The batch that is looked at ahead of training: as the collator makes it, and without the training noticing."""

import random
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from balance_shim.training.longest_batch import longest_batch

EXAMPLES = [{"input_ids": [number] * 8} for number in range(4)]


@dataclass
class Seeded:
    """Makes its generator with the first batch, as transformers' collator for masked language models does."""

    generator: Any = None
    made: int = 0

    def __call__(self, examples):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(7)
        self.made += 1
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "noise": torch.rand(3, generator=self.generator)}

    def draw(self):
        return self([{"input_ids": [0]}])["noise"].tolist()


class Old(Seeded):
    """Has a generator of Python's from the start."""

    def __init__(self):
        super().__init__(generator=random.Random(7))

    def __call__(self, examples):
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "noise": torch.tensor([self.generator.random()])}


def after_one_batch():
    collator = Seeded()
    collator.draw()
    return collator


@pytest.mark.parametrize("make", [Seeded, Old, after_one_batch])
@pytest.mark.parametrize("given", [lambda it: it, lambda it: it.__call__, partial], ids=["object", "method", "partial"])
def test_a_collator_with_a_seed_draws_the_same_afterwards(make, given):
    """Generators that a collator has, or makes for its first batch, are as they would be if nobody had looked."""
    looked_at, left_alone = make(), make()
    arguments = SimpleNamespace(remove_unused_columns=False)
    batch = longest_batch(SimpleNamespace(train_dataset=EXAMPLES, data_collator=given(looked_at), args=arguments), 2)
    assert batch["input_ids"].shape == (2, 8)
    assert looked_at.draw() == left_alone.draw() and looked_at.made == left_alone.made


def sharing():
    """Return a collator that draws from a generator around it, and that generator."""
    generator = torch.Generator().manual_seed(7)

    def collate(items):
        return {"input_ids": torch.tensor(items)[:, None], "noise": torch.rand(3, generator=generator)}

    return collate, generator


def test_items_of_any_kind_go_through_the_collator():
    """A list of numbers has a batch, and a generator that the collator's function shares is as before."""
    collate, generator = sharing()
    before = generator.get_state()
    arguments = SimpleNamespace(remove_unused_columns=True)
    batch = longest_batch(SimpleNamespace(train_dataset=[3, 4, 5], data_collator=collate, args=arguments), 2)
    assert batch["input_ids"].shape == (2, 1)
    assert torch.equal(generator.get_state(), before)
