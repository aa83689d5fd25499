"""Where the head of a model goes that is compared with another model's."""

import pytest

from balance_shim.device import describe
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner
from balance_shim.placement.compared_heads import device_of_compared_head
from balance_shim.placement.request import Request
from balance_shim.settings import Settings
from tests import models

GIB = 1 << 30


def plan_with(head_device, sizes=(2, 2, 2, 2), **changes):
    machine = tuple(describe(index, f"cuda:{index}", int(size * GIB), Settings()) for index, size in enumerate(sizes))
    workload = Workload(batch_size=4, seq_len=512)
    plan = planner.balanced(
        Request(TrainingCase.of(models.llama(**changes), workload), machine, head_device=head_device)
    )
    assert plan is not None and not plan.shortfall
    return plan


@pytest.mark.parametrize("head_device", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_where_it_is_compared(head_device, tied):
    """On whichever device that is, with the embedding if that is the same tensor, and the layers on the others too."""
    plan = plan_with(head_device, tie_word_embeddings=tied)
    assert plan.device_map["lm_head"] == head_device
    assert not tied or plan.device_map["model.embed_tokens"] == head_device
    assert len(set(plan.device_map.values())) == 4
    assert not [note for note in plan.notes if "same vocabulary" in note]


def test_a_head_without_room_there_goes_elsewhere_and_the_plan_notes_it():
    """A model that fits only with its heads apart is not kept from training."""
    plan = plan_with(1, sizes=(2, 0.3, 2, 2), vocab_size=32768)
    assert plan.device_map["lm_head"] != 1
    assert [note for note in plan.notes if "same vocabulary is on cuda:1" in note and "does not fit" in note]


def test_a_device_that_may_not_be_used_counts_for_nothing():
    """The plan is as if there were no other model, but for its note."""
    plan = plan_with(7)
    assert plan.device_map == plan_with(None).device_map
    assert [note for note in plan.notes if "may not use" in note]


def test_models_without_a_head_or_of_another_vocabulary_are_not_compared():
    """Neither an encoder, nor a model with more tokens, nor one that is not on a device yet tells where a head goes."""
    model = models.llama()
    assert device_of_compared_head(model, [model, models.bert_classifier(), models.llama(vocab_size=256)]) is None
    assert device_of_compared_head(model, [models.llama()]) is None
