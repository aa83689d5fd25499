"""TRL's GRPO with a reward model: it generates in inference mode, into ordinary tensors."""

import json
from pathlib import Path

import pytest

from balance_shim.versions import version_of
from tests import processes
from tests.end_to_end.assets import tiny_model_folder


@pytest.mark.exhaustive
@pytest.mark.skipif(version_of("trl") < (1, 0), reason="written for TRL 1.x")
def test_grpo_with_a_reward_model(tmp_path):
    """Two steps run on four simulated devices under a balanced map, with a reward for each and losses of about zero."""
    done = processes.python(
        "-m", "balance_shim", "simulate", "--gpus", "4x256MiB", Path(__file__).with_name("grpo_run.py"),
        str(tiny_model_folder()), str(tmp_path), timeout=400, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
        BALANCE_MODE="balanced",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"losses"')))
    assert len(result["losses"]) == len(result["rewards"]) == 2 and max(map(abs, result["losses"])) < 1e-4
    assert len(result["devices"]) > 1 and all(device.startswith("npu:") for device in result["devices"])
