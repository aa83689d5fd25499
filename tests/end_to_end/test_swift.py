"""ms-swift, which has no user script to import the shim in: its own command line, on four simulated devices."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end import swift
from tests.end_to_end.run import SHIM, on_python_path, read_peaks, run_command

pytestmark = pytest.mark.swift

FOUR = {"BALANCE_SIMULATE": "4x2GiB"}
WEIGHTS = {"lora": "checkpoint-3/adapter_model.safetensors", "full": "checkpoint-3/model.safetensors"}
MIB = 1024**2


def through_run(arguments):
    return [sys.executable, *SHIM, "swift", *arguments], {}


def through_python_path(arguments):
    return [swift.executable(), *arguments], on_python_path()


@pytest.fixture(scope="module")
def sft(tiny, chat, tmp_path_factory):
    """Train with ms-swift; return (losses, checkpoint files, peaks, report folder)."""

    def train(way, tuning, device_map=None, **variables):
        folder = tmp_path_factory.mktemp("swift")
        arguments = swift.sft_arguments(tiny, chat, folder / "output", tuning, device_map=device_map)
        command, paths = way(arguments)
        report = folder / "report"
        run_command(command, {**FOUR, **paths, "BALANCE_REPORT": str(report), **variables}).expect_success()
        output, peaks = folder / "output", read_peaks(report)
        assert sum(peaks) > MIB, "the training left no record of what its devices held"
        return swift.losses(output), swift.checkpoints(output), peaks, report

    return train


@pytest.fixture(scope="module")
def without(sft):
    """The losses of each kind of tuning without the shim."""
    return {tuning: sft(through_run, tuning, BALANCE_MODE="off")[0] for tuning in WEIGHTS}


@pytest.fixture(scope="module")
def balanced_full(sft):
    return sft(through_run, "full", BALANCE_MODE="balanced")


@pytest.mark.parametrize("tuning", WEIGHTS)
def test_same_losses_through_python_path(sft, without, tuning):
    """The folders on PYTHONPATH reach the process that ms-swift starts; it learns the same and saves its weights."""
    losses, checkpoints, peaks, _ = sft(through_python_path, tuning, BALANCE_MODE="balanced")
    assert len(losses) == 3
    assert losses == pytest.approx(without[tuning], rel=2e-5)
    assert checkpoints == [WEIGHTS[tuning]]
    assert min(peaks) > MIB


def test_lora_same_losses_through_balance_shim_run(sft, without):
    """`balance-shim run swift sft` with LoRA learns what `swift sft` learns, and saves the adapter."""
    losses, checkpoints, peaks, _ = sft(through_run, "lora", BALANCE_MODE="balanced")
    assert losses == pytest.approx(without["lora"], rel=2e-5)
    assert checkpoints == [WEIGHTS["lora"]]
    assert min(peaks) > MIB


def test_full_same_losses_through_balance_shim_run(balanced_full, without):
    """`balance-shim run swift sft` training all weights learns what `swift sft` learns, and saves the model."""
    losses, checkpoints, peaks, _ = balanced_full
    assert losses == pytest.approx(without["full"], rel=2e-5)
    assert checkpoints == [WEIGHTS["full"]]
    assert min(peaks) > MIB


def test_one_map_file_for_swift_and_for_the_shim(sft, balanced_full):
    """The map of a balanced run's report, given to ms-swift and to the shim, places everything as that run did."""
    losses, _, peaks, report = balanced_full
    file = report / "device_map.json"
    by_swift = sft(through_run, "full", device_map=file, BALANCE_MODE="off")
    by_shim = sft(through_run, "full", BALANCE_DEVICE_MAP=str(file))
    assert by_swift[0] == pytest.approx(losses, rel=2e-5)
    assert by_shim[0] == pytest.approx(losses, rel=2e-5)
    assert by_swift[2] == pytest.approx(peaks, rel=0.02)
    assert by_shim[2] == pytest.approx(peaks, rel=0.02)


@pytest.mark.parametrize("tuning", [pytest.param("lora", marks=pytest.mark.exhaustive), "full"])
def test_zero3_through_its_own_launcher(tuning, tiny, chat, tmp_path):
    """Two CPU processes, started by ms-swift itself, learn what one learns; whole weights are saved.

    Without dropout on the adapters' inputs (0.05 by default): ranks draw other masks than one process does.
    """
    losses = {}
    for name, mode in (("alone", "off"), ("divided", "zero3")):
        arguments = swift.sft_arguments(tiny, chat, tmp_path / name, tuning)
        if tuning == "lora":
            arguments += ["--lora_dropout", "0"]
        # fp16 is its default for float32 weights, which DeepSpeed takes up on processors with AVX-512 FP16.
        arguments += ["--fp16", "false"]
        if name == "alone":
            arguments[arguments.index("--per_device_train_batch_size") + 1] = "2"
        variables = {"BALANCE_MODE": mode} | ({"BALANCE_NPROC": "2"} if mode == "zero3" else {})
        outcome = run_command([sys.executable, *SHIM, "swift", *arguments], variables).expect_success()
        losses[name] = swift.losses(tmp_path / name)
        assert swift.checkpoints(tmp_path / name) == [WEIGHTS[tuning]]
    assert "swift starts 2 processes" in outcome.stderr and "ZeRO-3 over 2 processes" in outcome.stderr
    assert len(losses["alone"]) == 3
    assert losses["divided"] == pytest.approx(losses["alone"], rel=2e-5)
    alone, divided = (load_file(tmp_path / name / WEIGHTS[tuning]) for name in ("alone", "divided"))
    assert divided.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("tuning", [pytest.param("lora", marks=pytest.mark.exhaustive), "full"])
def test_replicas_through_its_own_launcher(tuning, tiny, chat, tmp_path):
    """Two ranks, each on its share of four simulated devices, learn what one process learns of the same batches."""
    losses = {}
    for name, variables in (("alone", {"BALANCE_MODE": "off"}), ("replicas", {"BALANCE_REPLICAS": "2"})):
        arguments = swift.sft_arguments(tiny, chat, tmp_path / name, tuning)
        if tuning == "lora":
            arguments += ["--lora_dropout", "0"]
        if name == "alone":
            arguments[arguments.index("--per_device_train_batch_size") + 1] = "2"
        report = {"BALANCE_REPORT": str(tmp_path / f"{name}-report")}
        outcome = run_command([sys.executable, *SHIM, "swift", *arguments], {**FOUR, **report, **variables})
        outcome.expect_success()
        losses[name] = swift.losses(tmp_path / name)
        assert swift.checkpoints(tmp_path / name) == [WEIGHTS[tuning]]
    assert "swift starts 2 processes for replicas" in outcome.stderr and "rank 0 on npu:0+2" in outcome.stderr
    assert min(read_peaks(tmp_path / "replicas-report")) > MIB
    assert losses["replicas"] == pytest.approx(losses["alone"], rel=2e-5) and len(losses["alone"]) == 3
