"""Unmodified training scripts on four simulated devices: they run, and learn what they learn without the shim."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.end_to_end.run import SCRIPTS, SHIM, on_python_path, run_script
from tests.sampling import sampled

FOUR = {"BALANCE_SIMULATE": "4x2GiB"}
ONE = {"BALANCE_SIMULATE": "1x24GiB"}
OFF = {"BALANCE_MODE": "off"}
BALANCED = {"BALANCE_MODE": "balanced"}
MIB = 1024**2

# transformers 4 rounds what it logs to four decimals; the order of additions differs between placements.
SAME = {"rel": 2e-5}


@pytest.fixture(scope="module")
def arguments(tiny, text):
    return ["--model", str(tiny), "--data", str(text), "--save"]


@pytest.fixture(scope="module")
def large_batches(arguments):
    """Eight sequences: the head's memory for them exceeds that of a weight's gradient, which accumulation keeps."""
    return [*arguments, "--batch-size", "8"]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The plain script on the CPU, in a process that has nothing of ours."""
    folder = tmp_path_factory.mktemp("alone")
    return run_script("plain_trainer.py", arguments, folder).expect_success(), folder


@pytest.fixture(scope="module")
def balanced(arguments, tmp_path_factory):
    """The plain script on four simulated devices, balanced."""
    folder = tmp_path_factory.mktemp("balanced")
    return run_script("plain_trainer.py", arguments, folder, {**FOUR, **BALANCED}, SHIM).expect_success(), folder


def trl_version():
    from importlib.metadata import version

    return Version(version("trl"))


def trl_arguments(arguments):
    """TRL chooses "auto" by itself since 0.26; before, its users write so in their script."""
    return arguments if trl_version() >= Version("0.26") else [*arguments, "--device-map", "auto"]


def weights(folder):
    """All saved tensors by name, whichever number of files they are in."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("output/checkpoint-*/*.safetensors"))
    assert files, f"no checkpoint in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_same_losses_without_and_with_the_shim(alone, balanced):
    """The same seed gives the same losses on one device without the shim and spread over four with it."""
    assert len(alone[0].losses) == 4
    assert len(set(alone[0].losses)) == 4
    assert balanced[0].losses == pytest.approx(alone[0].losses, **SAME)


def test_same_weights_without_and_with_the_shim(alone, balanced):
    """The checkpoints saved after the last step hold the same tensors by the same names."""
    expected, actual = weights(alone[1]), weights(balanced[1])
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_every_device_is_used(balanced):
    """The balanced run holds something of weight on each of the four devices."""
    assert len(balanced[0].peaks) == 4
    assert min(balanced[0].peaks) > MIB


def test_same_losses_when_armed_through_pythonpath(arguments, alone, tmp_path):
    """The two folders on PYTHONPATH and BALANCE_MODE do what `balance-shim run` does."""
    environment = {**FOUR, **BALANCED, **on_python_path()}
    outcome = run_script("plain_trainer.py", arguments, tmp_path, environment).expect_success()
    assert outcome.losses == pytest.approx(alone[0].losses, **SAME)
    assert min(outcome.peaks) > MIB


def test_map_that_was_written_can_be_given_back(arguments, balanced, tmp_path):
    """BALANCE_DEVICE_MAP with the map of an earlier run's report places everything as that run did."""
    report = balanced[1] / "report" / "device_map.json"
    environment = {**FOUR, "BALANCE_DEVICE_MAP": str(report)}
    outcome = run_script("plain_trainer.py", arguments, tmp_path, environment, SHIM).expect_success()
    assert outcome.losses == pytest.approx(balanced[0].losses, **SAME)
    assert outcome.peaks == pytest.approx(balanced[0].peaks, rel=0.02)


def test_map_by_hand_is_obeyed(arguments, alone, tmp_path):
    """A user's own map is followed to the letter: two of the four devices stay empty.

    Script, map and results lie in a folder whose name has spaces and letters beyond ASCII.
    """
    by_hand = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers": 0, "model.norm": 2, "lm_head": 2}
    folder = tmp_path / "größe und 値"
    folder.mkdir()
    script = Path(shutil.copy(SCRIPTS / "plain_trainer.py", folder / "mein skript.py"))
    file = folder / "eine karte.json"
    file.write_text(json.dumps(by_hand))
    environment = {**FOUR, "BALANCE_DEVICE_MAP": str(file)}
    outcome = run_script(script, arguments, folder, environment, SHIM).expect_success()
    assert outcome.losses == pytest.approx(alone[0].losses, **SAME)
    assert [peak > MIB for peak in outcome.peaks] == [True, False, True, False]


def test_peft_same_losses_and_adapter_saved(arguments, tmp_path):
    """LoRA with PEFT learns the same without the shim on the CPU and with it on four devices, and saves its adapter."""
    expected = run_script("peft_lora.py", arguments, tmp_path / "alone").expect_success()
    environment = {**FOUR, **BALANCED}
    outcome = run_script("peft_lora.py", arguments, tmp_path / "balanced", environment, SHIM).expect_success()
    assert len(outcome.losses) == 4
    assert outcome.losses == pytest.approx(expected.losses, **SAME)
    adapters = [weights(tmp_path / where) for where in ("alone", "balanced")]
    assert adapters[0].keys() == adapters[1].keys()


@pytest.mark.skipif(trl_version() < Version("0.26"), reason="TRL before 0.26 does not choose device_map='auto' itself")
def test_trl_without_the_shim_stops_with_a_cross_device_error(arguments, tmp_path):
    """Without the shim TRL divides a loss on the head's device by a count on the first, which is what users meet."""
    outcome = run_script("trl_sft.py", arguments, tmp_path, {**FOUR, **OFF}, SHIM)
    assert outcome.exit_code == 1, outcome.tail()
    assert "Expected all tensors to be on the same device" in outcome.stderr
    assert outcome.losses == []


@pytest.fixture(scope="module")
def trl(large_batches, tmp_path_factory):
    """TRL on four simulated devices, balanced."""
    folder = tmp_path_factory.mktemp("trl")
    argv = trl_arguments(large_batches)
    return run_script("trl_sft.py", argv, folder, {**FOUR, **BALANCED}, SHIM).expect_success(), folder


def test_trl_same_losses_as_on_one_device(large_batches, trl, tmp_path):
    """TRL trains on four devices with the shim, to the losses that it has on one device without it."""
    # On a CPU TRL would choose other defaults, so what is compared with is one simulated device.
    expected = run_script("trl_sft.py", large_batches, tmp_path, {**ONE, **OFF}, SHIM).expect_success()
    outcome, folder = trl
    assert len(outcome.losses) == 4
    assert outcome.losses == pytest.approx(expected.losses, **SAME)
    assert sum(peak > MIB for peak in outcome.peaks) > 1
    assert weights(folder).keys() == weights(tmp_path).keys()


def test_trl_obeys_what_the_variables_say_of_memory(large_batches, trl, tmp_path):
    """One row at a time and layers recomputed: the same losses in less memory, on devices watched for a re-balance."""
    variables = {"BALANCE_MICRO_BATCH": "1", "BALANCE_GRADIENT_CHECKPOINTING": "1", "BALANCE_REBALANCE": "1"}
    argv = trl_arguments(large_batches)
    outcome = run_script("trl_sft.py", argv, tmp_path, {**FOUR, **BALANCED, **variables}, SHIM).expect_success()
    assert outcome.losses == pytest.approx(trl[0].losses, rel=1e-4)
    assert sum(outcome.peaks) < 0.9 * sum(trl[0].peaks)
    assert "accumulation 1 -> 8" in outcome.stderr or "accumulation 8" in outcome.stderr


def test_trl_trains_in_the_precision_that_the_variable_says(large_batches, trl, tmp_path):
    """Weights are saved in bfloat16, and the first loss is that of float32 as far as bfloat16 goes."""
    argv = trl_arguments(large_batches)
    variables = {**FOUR, **BALANCED, "BALANCE_PRECISION": "bf16"}
    outcome = run_script("trl_sft.py", argv, tmp_path, variables, SHIM).expect_success()
    assert {str(tensor.dtype) for tensor in weights(tmp_path).values()} == {"torch.bfloat16"}
    assert outcome.losses[0] == pytest.approx(trl[0].losses[0], rel=5e-3)
    assert "BALANCE_PRECISION=bf16 instead of float32 saves" in outcome.stderr


# A program that has chunks of eight megabytes, so that a tiny model's logits are cut up.
SMALL_CHUNKS = (
    "-c",
    "import sys, runpy, balance_shim; from balance_shim.logits import chunks; chunks.CHUNK_BYTES = 2**23; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
)


@pytest.mark.parametrize("script", sampled(["plain_trainer.py", "peft_lora.py", "trl_sft.py"], "plain_trainer.py"))
def test_same_losses_in_chunks(script, arguments, tmp_path):
    """With the loss in chunks the losses are the same to 1e-4, and no library reads the logits behind its back.

    TRL 0.19 looks at them in each step, for the accuracy that it logs, which is done in chunks; 1.16 never has them.
    """
    argv = trl_arguments(arguments) if script.startswith("trl") else arguments
    runs = {}
    for loss in ("full", "chunked"):
        environment = {**FOUR, **BALANCED, "BALANCE_LOSS": loss}
        runs[loss] = run_script(script, argv, tmp_path / loss, environment, SMALL_CHUNKS).expect_success()
    assert runs["chunked"].losses == pytest.approx(runs["full"].losses, rel=1e-4) and len(runs["full"].losses) == 4
    assert "full logits" not in runs["chunked"].stderr and "reads the full logits" not in runs["chunked"].stderr
    if script != "trl_sft.py" or trl_version() < Version("0.26"):
        # Each of the 2 x 128 rows of logits is 49,152 values, and the loss keeps more than two copies in float32.
        assert max(runs["chunked"].peaks) < max(runs["full"].peaks) - 50 * MIB
