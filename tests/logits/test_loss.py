"""The loss from logits in chunks: the same value, the same gradients, and never more logits than a chunk.

Tolerances, in float32: 1e-6 of the loss, and 1e-5 of the largest gradient of each parameter.
"""

import contextlib

import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from balance_shim.logits import chunks, head
from balance_shim.versions import version_of
from tests.logits.small_models import (
    CHUNK,
    MODELS,
    SEQUENCES,
    TOKENS,
    VOCABULARY,
    MostRows,
    batch,
    build,
)


def from_outputs(model, inputs, **options):
    return model(**inputs, **options).loss


def smoothed(model, inputs):
    """As `Trainer.compute_loss` does it with `label_smoothing_factor`."""
    labels = inputs.pop("labels")
    return LabelSmoother(epsilon=0.2)(model(**inputs), labels, shift_labels=True)


def own_loss(model, inputs):
    """As trainers do it that know nothing of any library's loss functions."""
    labels = inputs.pop("labels")
    logits = model(**inputs).logits[..., :-1, :].contiguous().view(-1, VOCABULARY)
    return nn.functional.cross_entropy(logits, labels[..., 1:].flatten(), label_smoothing=0.3)


def autocast(model, inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(**inputs).loss


def masked(model, inputs):
    """As older vision-language models do it: rows that count are picked by the attention mask."""
    labels = inputs.pop("labels")
    logits = model(**inputs).logits[..., :-1, :][labels[..., 1:] != -100].contiguous()
    return nn.CrossEntropyLoss(reduction="none")(logits.float(), labels[..., 1:][labels[..., 1:] != -100]).mean()


LOSSES = {
    "from outputs": from_outputs,
    "smoothed": smoothed,
    "own loss": own_loss,
    "masked": masked,
}


def step(name, loss_of, in_chunks, **options):
    """Return loss, gradients by name, and the most rows of logits, of one step of a model made anew."""
    model = build(name)
    with MostRows() as most, head.deferring(model) if in_chunks else contextlib.nullcontext():
        loss = loss_of(model, batch(), **options)
        loss.backward()
    return (
        loss.detach(),
        {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None},
        most.rows,
    )


def compare(name, loss_of, tolerance=1e-5, **options):
    loss, gradients, rows = step(name, loss_of, in_chunks=False, **options)
    chunked_loss, chunked_gradients, chunked_rows = step(name, loss_of, in_chunks=True, **options)
    assert rows >= SEQUENCES * (TOKENS - 1) - 11 and chunked_rows <= CHUNK, (rows, chunked_rows)
    torch.testing.assert_close(chunked_loss, loss, rtol=tolerance / 10, atol=0)
    assert chunked_gradients.keys() == gradients.keys()
    for key, expected in gradients.items():
        worst = (chunked_gradients[key] - expected).abs().max()
        assert worst <= tolerance * expected.abs().max(), (key, worst, expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_same_loss_and_gradients_as_with_full_logits(name, monkeypatch):
    """Heads of every kind, with labels that do not count; the number of chunks is not bounded here."""
    monkeypatch.setattr(chunks, "MOST_CHUNKS_IN_TRAINING", 1000)
    compare(name, from_outputs)


@pytest.mark.parametrize("name", ["plain", "soft-capped", "lora"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_way_to_a_loss(name, loss, monkeypatch):
    """The model's own, the Trainer's label smoothing, and what other people write."""
    monkeypatch.setattr(chunks, "MOST_CHUNKS_IN_TRAINING", 1000)
    compare(name, LOSSES[loss])


@pytest.mark.skipif(version_of("transformers") < (4, 47), reason="the loss has no such argument there")
@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_divided_by_the_number_of_items(count, monkeypatch):
    """With `num_items_in_batch` the loss is a sum divided by what the Trainer has counted."""
    monkeypatch.setattr(chunks, "MOST_CHUNKS_IN_TRAINING", 1000)
    compare("plain", from_outputs, num_items_in_batch=count)


def test_under_autocast(monkeypatch):
    """Autocast at the head's call holds for every chunk, also when it is computed again; bfloat16's tolerance."""
    monkeypatch.setattr(chunks, "MOST_CHUNKS_IN_TRAINING", 1000)
    compare("plain", autocast, tolerance=1e-2)


def test_only_ignored_labels_give_what_they_give_in_full():
    """A mean over nothing is not a number, in chunks too."""
    model = build()
    inputs = batch()
    inputs["labels"][:] = -100
    with head.deferring(model):
        assert model(**inputs).loss.isnan()


def test_a_head_that_trains_gets_few_chunks():
    """Each chunk's gradient of the head is rounded to the weight's precision when it is added."""
    assert chunks.rows_in_chunk(4096, VOCABULARY, head_trains=False) == CHUNK
    assert chunks.rows_in_chunk(4096, VOCABULARY, head_trains=True) == 4096 / chunks.MOST_CHUNKS_IN_TRAINING
    assert chunks.rows_in_chunk(2 * CHUNK - 1, VOCABULARY, head_trains=False) == 2 * CHUNK - 1


def test_half_precision_head_that_trains(monkeypatch):
    """In bfloat16 the gradient of the head, added up from sixteen chunks, is the same to 2 % of its largest value."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * chunks.BYTES_PER_LOGIT * VOCABULARY)
    assert SEQUENCES * TOKENS / chunks.rows_in_chunk(SEQUENCES * TOKENS, VOCABULARY, head_trains=True) == 16
    results = []
    for in_chunks in (False, True):
        model = build().to(torch.bfloat16)
        with head.deferring(model) if in_chunks else contextlib.nullcontext():
            loss = model(**batch()).loss
        loss.backward()
        results.append((loss.item(), model.lm_head.weight.grad.float()))
    (loss, gradient), (chunked_loss, chunked_gradient) = results
    assert chunked_loss == pytest.approx(loss, rel=1e-5)
    assert 0 < (chunked_gradient - gradient).abs().max() < 0.02 * gradient.abs().max()
