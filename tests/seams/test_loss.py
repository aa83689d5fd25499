"""BALANCE_LOSS in an unmodified training: the same losses, less memory where the head is, as predicted."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from balance_shim import state
from balance_shim.training import chunked_loss
from tests.seams.cases import results_of

MIB = 2**20
# Two rows of 128 tokens over 4096 words in float32: what one copy of the logits takes.
LOGITS = 2 * 128 * 4096 * 4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What loss_cases.py wrote: it trains a tiny model with a wide vocabulary on four simulated devices."""
    folder = tmp_path_factory.mktemp("loss")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    outcomes = results_of("loss_cases.py", folder / "model", folder)
    assert not [case["error"] for case in outcomes.values() if "error" in case]
    return outcomes


@pytest.mark.parametrize(
    ("name", "like", "tolerance"),
    [
        ("auto", "full", 1e-6),
        ("auto, bf16", "full", 1e-4),
        ("auto, smoothed", "full, smoothed", 1e-6),
        ("chunked, explicit map", "full", 1e-6),
        ("auto, read", "full", 1e-6),
    ],
)
def test_losses_are_those_of_full_logits(results, name, like, tolerance):
    """With accumulation, which brings `num_items_in_batch`, ignored labels, label smoothing, and autocast."""
    assert results[name]["losses"] == pytest.approx(results[like]["losses"], rel=tolerance)


def test_evaluation_is_as_it_was(results):
    """Evaluation of the model that was trained in chunks gives the same loss."""
    assert results["auto"]["evaluated"] == pytest.approx(results["full"]["evaluated"], rel=1e-6)


def at_head(outcome):
    return outcome["peaks"][outcome["head"]]


def test_the_heads_device_holds_a_chunk(results):
    """Full logits are there three times at the loss; in chunks that memory is not needed, whoever moves outputs."""
    assert at_head(results["full"]) > at_head(results["auto"]) + 2 * LOGITS - MIB
    assert max(results["auto"]["peaks"]) < 0.5 * max(results["full"]["peaks"])
    assert max(results["full, smoothed"]["peaks"]) > max(results["auto, smoothed"]["peaks"]) + 2 * LOGITS


@pytest.mark.parametrize("name", ["full", "auto", "auto, bf16", "auto, smoothed"])
def test_predicted_peaks_are_those_of_the_training(results, name):
    """The planner counts the chunks that the training has: 3 % of each device, and what the Trainer keeps."""
    outcome = results[name]
    assert outcome["method"] == "traced" and outcome["loss planned"] == name.partition(",")[0].replace(
        "auto", "chunked"
    )
    allowed = 3 * 32 * 4096 * 4 if "smoothed" in name else 64 * 1024  # its sums are over more than one chunk at once
    for predicted, peak in zip(outcome["predicted"], outcome["peaks"], strict=True):
        assert predicted == pytest.approx(peak, rel=0.03, abs=allowed)


def test_auto_leaves_models_alone_that_the_shim_has_not_placed(results):
    """There `chunked` has to be asked for."""
    assert at_head(results["auto, explicit map"]) > at_head(results["chunked, explicit map"]) + 2 * LOGITS - MIB


def test_logits_that_are_read_are_right_and_that_is_said_once(results):
    """A trainer that looks at the logits of each step gets them; one line says what that costs."""
    assert len(results["auto, read"]["seen"]) == 4 and all(
        0.1 < deviation < 0.3 for deviation in results["auto, read"]["seen"]
    )
    lines = {
        name: [line for line in outcome["log"] if "reads the full logits" in line] for name, outcome in results.items()
    }
    assert len(lines.pop("auto, read")) == 1 and not any(lines.values())


def test_trainers_without_labels_are_left_alone(results):
    """Their logits are tensors as ever, and the plan for them counts full logits."""
    outcome = results["auto, no labels"]
    assert outcome["seen"] == "SimulatedTensor" and outcome["loss planned"] == "full"
    assert outcome["peaks"][0] > results["auto"]["peaks"][0] + LOGITS


def trainer(**changes):
    arguments = {"n_gpu": 1, "torch_compile": False, **changes.pop("arguments", {})}
    return SimpleNamespace(args=SimpleNamespace(**arguments), is_model_parallel=False, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed"),
        ({"is_fsdp_enabled": True}, "FSDP"),
        ({"arguments": {"torch_compile": True}}, "torch.compile"),
        ({"arguments": {"n_gpu": 2}}, "DataParallel"),
        ({}, ""),
    ],
)
def test_ways_of_training_that_stay_in_full(changes, reason):
    """Each is named."""
    assert reason in chunked_loss.reason_for_full(trainer(**changes))
    assert bool(chunked_loss.reason_for_full(trainer(**changes))) == bool(reason)


@pytest.mark.parametrize(
    ("setting", "placed", "expected"),
    [("auto", True, True), ("auto", False, False), ("chunked", False, True), ("full", True, False)],
)
def test_what_the_variable_means(setting, placed, expected, monkeypatch):
    """auto: models that the shim has placed; chunked: any; full: none."""
    monkeypatch.setattr(state, "settings", lambda: SimpleNamespace(loss=setting))
    assert chunked_loss.wanted(trainer(), placed) is expected
    assert not chunked_loss.wanted(trainer(is_fsdp_enabled=True), placed)
