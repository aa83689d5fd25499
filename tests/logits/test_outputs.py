"""Logits that nobody has computed yet behave as logits: read, written to, kept, copied."""

import contextlib

import pytest
import torch
from torch import nn

from balance_shim.logits import head
from balance_shim.logits.deferred import DeferredLogits
from balance_shim.training.chunked_loss import deferring_for_a_step
from tests.logits.small_models import (
    CHUNK,
    SEQUENCES,
    TOKENS,
    VOCABULARY,
    MostRows,
    batch,
    build,
    deferred_outputs,
)


def test_logits_work_when_they_are_read(capsys):
    """They have shape and type without being computed, then the very values; that is said, once."""
    model = build()
    expected = model(**batch()).logits
    outputs = deferred_outputs(model)
    with MostRows() as most:
        assert outputs.logits.shape == expected.shape and outputs.logits.dtype == expected.dtype
        assert outputs.logits.device == expected.device and outputs.logits.requires_grad
        assert len(outputs.logits) == SEQUENCES and outputs.logits.size(-1) == VOCABULARY
    assert most.rows == 0
    torch.testing.assert_close(outputs.logits + 0, expected, rtol=0, atol=0)
    assert torch.equal(outputs.to_tuple()[1], expected)
    assert outputs.logits.detach().numpy().shape == expected.shape
    assert capsys.readouterr().err.count("reads the full logits") <= 1


def test_gradients_flow_through_logits_that_are_read():
    """Whatever somebody computes from them trains the model as it would."""
    gradients = []
    for in_chunks in (False, True):
        model = build()
        outputs = deferred_outputs(model) if in_chunks else model(**batch())
        (outputs.logits.cumsum(-1) ** 2).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


class Fused(torch.autograd.Function):
    """A loss that takes its arguments past the class of the tensor, as kernels written in C++ or Triton do."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return (logits * logits).mean()

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        return gradient * 2 * logits / logits.numel()


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_gradients_come_back_from_functions_that_see_no_class(name):
    """Other people's autograd functions get the values, and their gradients reach the model."""
    gradients = []
    for in_chunks in (False, True):
        model = build(name)
        outputs = deferred_outputs(model) if in_chunks else model(**batch())
        Fused.apply(outputs.logits.float()).backward()
        gradients.append(
            {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() and any(gradient.any() for gradient in gradients[1].values())
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-5, atol=1e-7, msg=key)


def test_what_libraries_do_to_outputs_does_not_compute_them():
    """accelerate moves all outputs to the first device and makes them float32; neither asks for the values."""
    from accelerate.utils import convert_outputs_to_fp32, send_to_device

    model = build()
    half = model.to(torch.bfloat16)
    with MostRows() as most, head.deferring(half):
        outputs = convert_outputs_to_fp32(half.forward)(**batch())
        outputs = send_to_device(outputs, torch.device("cpu"), non_blocking=True)
    assert type(outputs.logits) is DeferredLogits and outputs.logits.dtype == torch.float32
    assert 0 < most.rows <= CHUNK


def test_metrics_over_the_vocabulary_are_computed_in_chunks():
    """Accuracy as TRL logs it, entropy row by row, and log-probabilities of the labels need no full logits."""
    model = build()
    inputs = batch(ignored=False)
    index = inputs["labels"][:, 1:].unsqueeze(-1)

    def metrics(logits):
        rows = torch.cat([_entropy(part) for part in logits.reshape(-1, VOCABULARY).split(CHUNK)])
        per_sequence = [torch.logsumexp(row, dim=-1) for row in logits]
        return (
            logits.argmax(dim=-1),
            *logits.max(-1),
            logits.gather(-1, index),
            *per_sequence,
            rows,
            logits.mean(dim=-1),
        )

    expected = metrics(model(**inputs).logits[..., :-1, :])
    shifted = deferred_outputs(model, **inputs).logits[..., :-1, :].contiguous()
    with MostRows() as most, torch.no_grad():
        actual = metrics(shifted)
    assert 0 < most.rows <= CHUNK
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, reference)


def _entropy(logits):
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.transpose(0, 1).sum(),
        lambda logits: logits[..., 5:9].exp().sum(),
        lambda logits: logits[:, None].mean(),
        lambda logits: logits.view(-1).std(),
        lambda logits: logits.sum(0).max(),
        lambda logits: (logits * logits).sum(),
        lambda logits: (logits * torch.arange(VOCABULARY)).sum(),
        lambda logits: logits.clone().div_(3).sum(),
        lambda logits: torch.cat([logits, logits]).norm(),
        lambda logits: nn.functional.cross_entropy(logits.transpose(1, 2), batch()["labels"]),
        lambda logits: nn.functional.cross_entropy(logits[0], torch.full((TOKENS, VOCABULARY), 1 / VOCABULARY)),
        lambda logits: nn.functional.cross_entropy(logits[0], batch()["labels"][1], weight=torch.arange(640.0)),
        lambda logits: nn.functional.cross_entropy(input=logits[1], target=batch()["labels"][1]),
        lambda logits: 2 / (3 + logits.flatten(0, 1)[:5].softmax(dim=1)).sum(),
        lambda logits: logits.unbind()[1].detach().float().mean(),
        lambda logits: torch.stack(list(logits)).sum(),
    ],
)
def test_anything_else_gets_what_full_logits_give(change):
    """Operations that are not known, or known with other arguments, give the values that they would have given."""
    model = build()
    expected, actual = change(model(**batch()).logits), change(deferred_outputs(model).logits)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert actual.requires_grad == expected.requires_grad


def test_writing_into_logits():
    """Models that forbid tokens write into the logits before the loss: they are then there in full."""
    model = build()
    labels = batch()["labels"].flatten()
    losses = []
    for logits in (model(**batch()).logits, deferred_outputs(model).logits):
        logits[:, :, 3:30] = -1e4
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), labels))
    torch.testing.assert_close(*losses)


def test_no_gradients_where_there_would_be_none():
    """What is done to logits without gradients has none later, either."""
    logits = deferred_outputs(build()).logits
    with torch.no_grad():
        converted = logits.float()[:, 1:]
    assert not converted.requires_grad and not converted.logsumexp(-1).requires_grad
    assert not logits.detach().requires_grad and logits.float().requires_grad


@pytest.mark.parametrize(
    "read",
    [
        lambda outputs: outputs.logits.detach(),
        lambda outputs: outputs.logits[:, -3:].detach(),
        lambda outputs: outputs.logits.float().log_softmax(-1).detach(),
        lambda outputs: outputs,
    ],
)
def test_logits_that_outlive_their_step_are_those_of_the_step(read):
    """A script that keeps logits to look at them later finds what they were before the optimizer changed the head."""
    results = []
    for in_chunks in (False, True):
        model = build()
        with deferring_for_a_step(model) if in_chunks else contextlib.nullcontext():
            outputs = model(**batch())
            results.append(read(outputs))
            outputs.loss.backward()
            del outputs
        with torch.no_grad():
            model.lm_head.weight.zero_()
    expected, actual = ((result.logits if hasattr(result, "logits") else result).detach() for result in results)
    torch.testing.assert_close(actual + 0, expected, rtol=1e-5, atol=1e-6)


def _halve_all_but_last(logits):
    logits[:, :-1].mul_(0.5)
    return logits


def _shifted(logits):
    shifted = logits[..., :-1, :].view(SEQUENCES, TOKENS - 1, VOCABULARY)
    logits /= 2
    return shifted


def _copied(logits):
    logits[..., :-1, :].contiguous().zero_()
    logits.reshape(-1, VOCABULARY)[torch.arange(5)].zero_()
    return logits


def _by_sequence(logits):
    logits.unbind()[1].detach().zero_()
    logits[0].float()[3] = 1
    return logits


@pytest.mark.parametrize("write", [_halve_all_but_last, _shifted, _copied, _by_sequence])
def test_writing_into_a_part_of_logits(write):
    """Slices and other views share their memory with the logits, copies do not; whichever is written into."""
    model = build()
    results = []
    for logits in (model(**batch()).logits, deferred_outputs(model).logits):
        model.zero_grad()
        loss = write(logits).logsumexp(-1).sum()
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad.clone()))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_read_in_inference_mode_and_trained_with_afterwards():
    """A metric without gradients does not take them from the loss."""
    outputs = deferred_outputs(build())
    with torch.inference_mode():
        outputs.logits.topk(3)
    assert (outputs.logits * outputs.logits).mean().requires_grad


def test_a_model_copied_during_a_step_is_on_its_own():
    """A teacher that is copied, or saved, inside of `compute_loss` keeps its own head, and plain logits."""
    import copy
    import pickle

    model = build()
    expected = model(**batch()).logits
    with head.deferring(model):
        copied, saved = copy.deepcopy(model), pickle.dumps(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for other in (copied, pickle.loads(saved)):
        logits = other(**batch()).logits
        assert type(logits) is torch.Tensor
        torch.testing.assert_close(logits, expected)


def test_asking_where_tensors_are_made_does_not_compute_logits():
    """The monitor notes the module that makes each tensor for a step, which may be the one that has no room."""
    from balance_shim.monitoring.allocation_sites import Makers

    model = build()
    makers = Makers(model)
    makers.start()
    try:
        outputs = deferred_outputs(model)
    finally:
        makers.stop()
    assert outputs.logits.full is None and "by lm_head" in makers.of([outputs.logits])
