"""Adapters under ZeRO-3 over several starts of one script: resuming, and loading the best checkpoint at the end."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.end_to_end.run import SHIM, run_command

SCRIPT = Path(__file__).with_name("scripts") / "best_adapters.py"


def start(folder, name, processes, *, steps, batch_size=1, accumulation=1):
    """Run the script into `folder/name`; return its result. `processes` None: one, without the shim."""
    result = folder / f"{name}.json"
    arguments = ["--model", folder / "model", "--output", folder / name, "--result", result, "--steps", steps,
             "--batch-size", batch_size, "--accumulation", accumulation]  # fmt: skip
    shim = {} if processes is None else {"BALANCE_MODE": "zero3", "BALANCE_NPROC": str(processes)}
    command = [sys.executable, *(SHIM if shim else []), str(SCRIPT), *map(str, arguments)]
    run_command(command, {**shim, "BALANCE_NCCL_TIMEOUT": "120"} if shim else {}).expect_success()
    return json.loads(result.read_text())


@pytest.mark.sweep
def test_resumed_twice_with_other_numbers_of_processes(tmp_path):
    """Two processes to step 4, then two or three to step 8: losses and best weights of one uninterrupted process."""
    models.saved_llama(tmp_path / "model", num_hidden_layers=2, vocab_size=128)
    expected = start(tmp_path, "one", None, steps=8, batch_size=6)
    first = start(tmp_path, "two", 2, steps=4, accumulation=3)
    assert first["losses"] == pytest.approx(expected["losses"][:4], rel=1e-4) and not first["resumed"]
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    second = start(tmp_path, "two", 2, steps=8, accumulation=3)
    third = start(tmp_path, "three", 3, steps=8, accumulation=2)
    for later in (second, third):
        assert later["resumed"] and later["best"] == expected["best"]
        assert later["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    best = load_file(tmp_path / "one" / expected["best"] / "adapter_model.safetensors")
    for name in ("two", "three"):
        saved = load_file(tmp_path / name / "final" / "adapter_model.safetensors")
        assert saved.keys() == best.keys() and saved
        for key, tensor in best.items():
            torch.testing.assert_close(saved[key], tensor, rtol=1e-2, atol=1e-4, msg=key)
