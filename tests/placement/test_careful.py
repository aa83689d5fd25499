"""Where blocks go that no dry run has reached, and how a map names them."""

from dataclasses import replace

import torch
import transformers

from balance_shim.device import describe
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner
from balance_shim.placement.request import Request
from balance_shim.settings import Settings
from tests import models

GIB = 1 << 30


class Sees(transformers.LlamaForCausalLM):
    """A language model with a tower of its own, under an argument that nobody could guess."""

    def __init__(self, config):
        super().__init__(config)
        self.eye = torch.nn.Module()
        self.eye.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(64, 64)) for _ in range(40))

    def forward(self, input_ids, labels=None, retina=None, **kwargs):
        outputs = super().forward(input_ids, labels=labels, **kwargs)
        if retina is not None:
            crossing = retina
            for layer in self.eye.layers:
                crossing = layer(crossing) + retina
            outputs.loss = outputs.loss + crossing.sum()
        return outputs


def plan_and_costs(size=4 * GIB):
    config = transformers.LlamaConfig(**models.SIZES, num_key_value_heads=2)
    machine = tuple(describe(index, f"cuda:{index}", size, Settings()) for index in range(4))
    model = models.on_meta(Sees, config)
    model._no_split_modules = None
    request = Request(TrainingCase.of(model, Workload(batch_size=2, seq_len=64)), machine)
    return planner.balanced(request), planner.cost(request)


def test_a_tower_that_the_dry_run_does_not_reach_stays_whole_on_the_first_device():
    """It is named as one module, so that its inputs are brought to it; the plan has a line on it."""
    plan, costed = plan_and_costs()
    assert len(costed.unreached) == 40
    assert plan.device_map["eye"] == 0 and not any(name.startswith("eye.") for name in plan.device_map)
    assert len({plan.device_map[f"model.layers.{number}"] for number in range(6)}) > 1
    assert [note for note in plan.notes if note.startswith("not reached by the dry run") and "eye" in note]


def test_what_has_been_reached_is_not_bonded():
    """The same plan without anything unreached splits the tower."""
    _, costed = plan_and_costs()
    from balance_shim.placement.careful import carefully

    machine = [describe(index, f"cuda:{index}", 4 * GIB, Settings()) for index in range(4)]
    assert carefully(replace(costed, unreached=frozenset()), machine).constraints == costed.constraints
