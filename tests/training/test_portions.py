"""Which micro-batches may be run in portions, and what is run again: no model, no devices."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from balance_shim.settings import Settings
from balance_shim.training import micro_batch
from balance_shim.training.loss_scale import ignores_count
from balance_shim.training.portions import Portions, batch_size_of
from balance_shim.versions import version_of

COUNTS = pytest.mark.skipif(version_of("transformers") < (4, 46), reason="counts no labels of a step")


def trainer(kind=transformers.Trainer, **changes):
    """Return an object of class `kind` with what the portions look at, and nothing else."""
    made = object.__new__(kind)
    made.__dict__ |= {
        "model_accepts_loss_kwargs": True, "compute_loss_func": None, "current_gradient_accumulation_steps": 1,
        "args": SimpleNamespace(
            per_device_train_batch_size=4, train_batch_size=4, gradient_accumulation_steps=1,
            auto_find_batch_size=False, dataloader_drop_last=False,
        ),
        "accelerator": SimpleNamespace(sync_gradients=True, gradient_accumulation_steps=1), **changes,
    }  # fmt: skip
    return made


class Model:
    def zero_grad(self, set_to_none):
        self.rows = []


def run(portions, owner, batch, most_rows=1000, counted=True):
    """Run one micro-batch; return the rows whose gradients there are."""
    model = Model()
    model.rows = []

    def some(_, inputs):
        if len(inputs["labels"]) > most_rows:
            raise torch.OutOfMemoryError("out of memory")
        model.rows += inputs["labels"].tolist()
        return torch.tensor(0.0)

    portions.run(owner, some, model, batch, counted)
    return model.rows


def batch(*labels):
    return {"labels": torch.tensor(labels)}


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.ones(2, 3), torch.ones(2)),
        [torch.ones(2)],
        {"text": {"ids": torch.ones(2, 3), "mask": torch.ones(2, 3)}, "labels": torch.ones(2)},
    ],
)
def test_batches_of_other_kinds_are_left_whole(inputs):
    """A script's own loop may take tuples or dicts in dicts; nothing is divided, nothing fails."""
    assert batch_size_of(inputs) is None
    assert Portions().run(trainer(), lambda model, inputs: inputs, None, inputs, counted=False) is inputs


def test_a_name_in_the_batch_does_not_count_as_rows():
    assert batch_size_of({"labels": torch.ones(2), "task": "summarize"}) == 2


@COUNTS
def test_without_a_count_of_labels_portions_are_means():
    """Then the Trainer divides by the accumulation: losses do not add up, and rows of other labels are left whole."""
    plain = trainer()
    assert run(Portions(), plain, batch(1, 2), most_rows=1) == [1, 2]
    uneven = {"input_ids": torch.ones(2), "targets": torch.ones(2)}
    with pytest.raises(torch.OutOfMemoryError):
        Portions().run(plain, _runs_out, None, uneven, counted=False)


def _runs_out(*_):
    raise torch.OutOfMemoryError("out of memory")


class OfItsOwn(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs)[0].mean()


class HandingOn(transformers.Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


class Counting(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs)[0].sum() / num_items_in_batch


@COUNTS
def test_a_loss_that_ignores_the_count_is_left_whole(monkeypatch):
    """The Trainer adds such losses up undivided: with twice the micro-batches they would count twice."""
    assert [ignores_count(trainer(kind)) for kind in (OfItsOwn, HandingOn, Counting)] == [True, False, False]
    assert not ignores_count(trainer())
    assert run(Portions(), trainer(Counting), batch(1, 2), most_rows=1) == [1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        run(Portions(), trainer(OfItsOwn), batch(1, 2), most_rows=1)
    messages = []
    monkeypatch.setattr("balance_shim.log.once", lambda level, line: messages.append(line))
    micro_batch.take_largest(trainer(OfItsOwn), lambda: pytest.fail("nothing is to be tried"))
    assert "compute_loss of OfItsOwn ignores num_items_in_batch" in messages[0]


@COUNTS
@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_nothing_is_left_of_a_step_that_failed(failure):
    """What is trained afterwards does not repeat micro-batches of the step that an error has ended."""
    portions, owner = Portions(), trainer()
    owner.accelerator.sync_gradients = False
    assert run(portions, owner, batch(1, 2)) == [1, 2]

    def fails(*_):
        raise failure

    with pytest.raises(failure):
        portions.run(owner, fails, Model(), batch(3), counted=True)
    owner.accelerator.sync_gradients = True
    assert run(portions, owner, batch(4, 5), most_rows=1) == [4, 5]


@COUNTS
def test_a_step_is_repeated_whole_and_then_let_go():
    """The micro-batches before the one that ran out are run again; none is kept alive when the step is over."""
    portions, owner = Portions(), trainer()
    owner.accelerator.sync_gradients = False
    run(portions, owner, batch(1, 2))
    owner.accelerator.sync_gradients = True
    assert run(portions, owner, batch(3, 4), most_rows=1) == [1, 2, 3, 4]
    assert portions._done == []


@COUNTS
@pytest.mark.parametrize(
    ("kind", "examples", "drops", "expected"),
    [(Counting, 40, False, 3), (Counting, 42, True, 3), (Counting, 40, True, 6), (OfItsOwn, 40, False, 6)],
)
def test_a_number_is_taken_back_where_losses_or_rows_depend_on_it(kind, examples, drops, expected, monkeypatch):
    """Means that are added up, and rows that are left out, come out as the script's own size has them."""
    monkeypatch.setattr("balance_shim.state.settings", lambda: Settings(micro_batch=3))
    messages = []
    monkeypatch.setattr("balance_shim.log.once", lambda level, line: messages.append(line))
    owner = trainer(kind, train_dataset=range(examples))
    owner.args.per_device_train_batch_size, owner.args.dataloader_drop_last = 6, drops
    micro_batch.adjust_arguments(owner.args)
    assert owner.args.per_device_train_batch_size == 3
    micro_batch.begin(owner)
    arguments = owner.args
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (expected, 6 // expected)
    assert [line.endswith("so it stays 6") for line in messages] == [True] * (expected == 6)
