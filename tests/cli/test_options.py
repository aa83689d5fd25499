"""Options and configs of all kinds, as `balance-shim plan` understands them."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import transformers

from balance_shim.errors import UsageError
from balance_shim.plan_options import read_options
from balance_shim.units import MIB
from balance_shim.versions import version_of
from tests import models, processes
from tests.cli.running import (
    MACHINE,
    QUIET,
    SHORT,
    plan,
    plan_json,
    seven_billion,
    together,
)


@pytest.mark.parametrize("command", ["plan", "env"])
def test_a_reader_that_leaves_early_changes_nothing(saved, command):
    """With standard output closed by its reader, as `| head` does, there is no traceback and the exit code holds."""
    read, write = os.pipe()
    os.close(read)
    options = (str(saved / "llama"), "--gpus", MACHINE, *SHORT) if command == "plan" else ()
    arguments = ("-m", "balance_shim", command, *options)
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=processes.environment(processes.SHIM, **QUIET),
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_variables_are_defaults_for_options(saved):
    """BALANCE_* variables say what options leave open, options go first, and caps and reserve hold."""
    plan_data = plan_json(
        saved / "llama",
        "--seq-len", "32",
        "--gradient-checkpointing",
        "--accumulation", "3",
        BALANCE_SIMULATE="2x512MiB",
        BALANCE_SEQ_LEN="16",
        BALANCE_BATCH_SIZE="2",
        BALANCE_TUNING="lora",
        BALANCE_OPTIMIZER="sgd",
        BALANCE_PRECISION="fp16",
        BALANCE_MAX_MEMORY="1=256MiB",
        BALANCE_RESERVE="1MiB",
    )  # fmt: skip
    expected = {
        "batch_size": 2, "seq_len": 32, "accumulation": 3, "tuning": "lora", "optimizer": "sgd",
        "gradient_checkpointing": True,
    }  # fmt: skip
    assert {name: plan_data["workload"][name] for name in expected} == expected
    assert plan_data["model"]["dtype"] == "fp16"
    assert [device["capacity"] for device in plan_data["devices"]] == [511 * MIB, 255 * MIB]


def test_bare_checkpointing_in_front_of_the_model(saved):
    """`--gradient-checkpointing MODEL` means 1, and 0 can be said; less is kept with it."""
    rest = (saved / "llama", "--json", "--gpus", MACHINE, "--batch-size", "8", *SHORT)
    done = together(("--gradient-checkpointing", *rest), ("--gradient-checkpointing", "0", *rest))
    devices_by_plan = [json.loads(output)["devices"] for _, output, _ in done]
    activations = [sum(device["terms"]["activations"] for device in devices) for devices in devices_by_plan]
    assert activations[0] < activations[1]


def test_precision_falls_back_to_the_config_and_then_to_bf16(tmp_path):
    """Weights are counted in what the config names; in bf16 where it names nothing, which is said."""
    transformers.LlamaConfig(**models.SIZES, torch_dtype="float16").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    silent = tmp_path / "silent.json"
    silent.write_text(json.dumps({key: value for key, value in config.items() if "dtype" not in key}))
    done = together(*((model, "--json", "--gpus", MACHINE, *SHORT) for model in (tmp_path, silent)))
    plans = [json.loads(output) for _, output, _ in done]
    assert [data["model"]["dtype"] for data in plans] == ["fp16", "bf16"]
    assert [any("dtype" in note for note in data["notes"]) for data in plans] == [False, True]


def test_a_config_without_a_class_gets_one_supposed(tmp_path):
    """A config that names no architecture is planned as the usual class of its type, and the plan says so."""
    config = transformers.LlamaConfig(**models.SIZES)
    config.save_pretrained(tmp_path)
    plan_data = plan_json(tmp_path / "config.json", "--gpus", MACHINE, *SHORT)
    assert plan_data["model"]["class"] == "LlamaForCausalLM"
    assert any("assuming LlamaForCausalLM" in note for note in plan_data["notes"])


def test_remote_code_runs_only_when_allowed_and_off_standard_output(tmp_path):
    """A model with code of its own is refused in one line; allowed, it is planned, and what it prints is kept away."""
    (tmp_path / "own_model.py").write_text(
        textwrap.dedent(
            """
            from transformers import LlamaConfig, LlamaForCausalLM
            print("hello from afar")
            class OwnConfig(LlamaConfig):
                model_type = "own"
            class OwnForCausalLM(LlamaForCausalLM):
                config_class = OwnConfig
            """
        )
    )
    config = transformers.LlamaConfig(**models.SIZES).to_dict()
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = (tmp_path, "--gpus", MACHINE, *SHORT)
    refused = plan(*arguments)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--trust-remote-code" in refused.stderr
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert plan_json(*arguments, "--trust-remote-code", **modules)["model"]["class"] == "OwnForCausalLM"


@pytest.mark.skipif(version_of("transformers") < (5,), reason="4.x needs triton for it")
def test_quantized_weights_are_counted_as_loaded(tmp_path):
    """An fp8 config is planned with its linear layers at about one byte each, without a device that could run it."""
    folder = seven_billion(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    plan_data = plan_json(folder, "--gpus", "4x24GiB", "--seq-len", "128", "--tuning", "lora")
    weights = sum(device["terms"]["weights"] for device in plan_data["devices"])
    assert weights == pytest.approx(2 * 2 * 152064 * 3584 + 28 * 233e6, rel=0.01)


def test_a_hub_id_in_the_cache_is_planned_offline(saved, tmp_path):
    """Offline, a hub id whose config is in the local cache is planned from it."""
    snapshot = tmp_path / "hub" / "models--some--llama" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    (snapshot / "config.json").write_bytes((saved / "llama" / "config.json").read_bytes())
    plan_data = plan_json("some/llama", "--gpus", MACHINE, *SHORT, HF_HOME=str(tmp_path))
    assert plan_data["model"]["class"] == "LlamaForCausalLM"


@pytest.mark.parametrize("named", ["", "config.json"], ids=["folder", "file"])
def test_the_model_s_config_is_not_written_over(saved, named):
    """`--output` with the config itself would leave a folder of weights that nobody can load."""
    config = saved / "llama" / "config.json"
    before = config.read_text()
    with pytest.raises(UsageError, match="own config"):
        read_options([str(saved / "llama" / named), "--gpus", MACHINE, "--output", str(config)], {})
    assert config.read_text() == before
