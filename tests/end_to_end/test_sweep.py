"""A sample of the sweep over all model classes (`python -m benchmarks.sweep`), one or two of each task."""

import pytest

from balance_shim.versions import version_of
from benchmarks.sweep import table
from benchmarks.sweep.classes import candidates
from benchmarks.sweep.server import Server
from benchmarks.sweep.trials import MACHINE, ROOMY_MACHINE, record_of

pytestmark = pytest.mark.skipif(version_of("transformers") < (5, 0), reason="the sample is one of 5.x")

SAMPLE = (
    "LlamaForCausalLM",
    "PaliGemmaForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "Wav2Vec2ForCTC",
    "BertForQuestionAnswering",
    "DebertaV2ForTokenClassification",
    "GPT2ForSequenceClassification",
    "ViTForImageClassification",
    "SegformerForSemanticSegmentation",
)
RIGHT = ("runs under both", "healed")


@pytest.fixture(scope="module")
def servers():
    with Server("") as plain, Server(MACHINE) as machine, Server(ROOMY_MACHINE) as roomy:
        yield plain, machine, roomy


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_of_each_task_trains_with_the_losses_of_one_device(name, servers):
    """What trains on one device trains under our map, on several devices, with the same losses."""
    (candidate,) = [entry for entry in candidates() if entry.name == name]
    record = record_of(candidate, *servers, seconds=120)
    assert table.outcome(record) in RIGHT, record
    assert record["balanced"]["final_devices"] > 1
    assert table.same_losses(record, "balanced")


def test_the_sweep_knows_a_broken_class_from_a_healed_one():
    """The outcome follows from which training failed and whose losses differ, and nothing else."""
    good, bad, other = {"losses": [1.0, 2.0]}, {"error": "stopped"}, {"losses": [1.0, 2.1]}
    expected = {
        "runs under both": (good, good),
        "healed": (bad, good),
        "broken by us": (good, bad),
        "same failure": (bad, bad),
        "loss differs": (good, other),
    }
    for outcome, (off, balanced) in expected.items():
        assert table.outcome({"reference": good, "off": off, "balanced": balanced}) == outcome
    assert table.outcome({"reference": bad}) == "not trainable here"
