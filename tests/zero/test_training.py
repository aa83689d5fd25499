"""Unmodified scripts under BALANCE_MODE=zero3: real DeepSpeed, real processes on the CPU, real text.

Each is compared with one process that has nothing of ours and the same rows in each step.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from tests import models, recipes
from tests.end_to_end import assets
from tests.end_to_end.run import SHIM, child_environment, on_python_path, read_losses, run_command, run_script
from tests.sampling import sampled

SCRIPTS = Path(__file__).with_name("scripts")
TWO = {"BALANCE_MODE": "zero3", "BALANCE_NPROC": "2"}
FOUR = {"BALANCE_MODE": "zero3", "BALANCE_NPROC": "4"}
# transformers 4 rounds what it logs to four decimals; ranks add up in another order than one process does.
SAME = {"rel": 2e-5}
CLOSE = {"rtol": 1e-3, "atol": 1e-5}  # AdamW's first steps turn rounding into differences of the learning rate's size


@pytest.fixture(scope="module")
def tiny():
    return assets.tiny_model_folder(tied=False)


@pytest.fixture(scope="module")
def arguments(tiny):
    return ["--model", str(tiny), "--data", str(assets.text_file()), "--save"]


def saved(folder):
    """All tensors of the newest checkpoint of plain weights in `folder`."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("output/checkpoint-*/*.safetensors"))
    assert files, f"no checkpoint in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def expect_same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **CLOSE, msg=name)


def trl_device_map():
    """TRL chooses "auto" by itself since 0.26; before, its users write so in their script."""
    from importlib.metadata import version

    return [] if Version(version("trl")) >= Version("0.26") else ["--device-map", "auto"]


@pytest.mark.parametrize("script", ["plain_trainer.py", "trl_sft.py", "peft_lora.py"])
def test_two_processes_learn_what_one_learns(script, arguments, tmp_path):
    """A plain Trainer, TRL with a model path, and LoRA with PEFT: same losses, same weights, whole files saved."""
    more = trl_device_map() if script == "trl_sft.py" else []
    alone = run_script(script, [*arguments, "--batch-size", "4"], tmp_path / "alone").expect_success()
    divided = run_script(script, [*arguments, *more], tmp_path / "divided", TWO, SHIM).expect_success()
    assert len(set(alone.losses)) == len(alone.losses) == 4
    assert divided.losses == pytest.approx(alone.losses, **SAME)
    expect_same_weights(saved(tmp_path / "divided"), saved(tmp_path / "alone"))
    assert "ZeRO-3 over 2 processes" in divided.stderr and "loaded whole" not in divided.stderr
    # DeepSpeed's own log goes there; what 0.16 says when it is imported it says without us as well.
    lines = [line for line in divided.stdout.splitlines() if "[INFO]" in line and "real_accelerator" not in line]
    assert lines == []


@pytest.fixture(scope="module")
def model_first(tiny, tmp_path_factory):
    """The script that loads its model first and has no device map, alone and in four processes."""
    folder = tmp_path_factory.mktemp("model-first")
    command = [str(SCRIPTS / "model_first.py"), "--model", str(tiny), "--data", str(assets.text_file())]
    for name, environment, size in (("alone", {}, 4), ("four", {**FOUR, **on_python_path()}, 1)):
        outputs = ["--output", str(folder / name), "--losses", str(folder / f"{name}.jsonl"), "--batch-size", str(size)]
        run_command([sys.executable, *command, *outputs], environment).expect_success()
    return folder, command


def test_four_processes_with_the_model_loaded_first(model_first):
    """Armed through PYTHONPATH: the losses of training and evaluation are those of one process."""
    folder, _ = model_first
    logs = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("alone", "four")
    }
    for key, count in (("loss", 4), ("eval_loss", 2)):
        alone, four = ([entry[key] for entry in logs[name] if key in entry] for name in ("alone", "four"))
        assert len(alone) == count and four == pytest.approx(alone, **SAME)


def test_parameters_are_divided_from_loading_on(model_first):
    """Before there were TrainingArguments, and after training: each holds a quarter, to 1 %, and all see four ranks."""
    folder, _ = model_first
    reports = [json.loads((folder / "four" / f"rank-{rank}.json").read_text()) for rank in range(4)]
    for report in reports:
        assert report["world"] == {"asked": "4", "arguments": 4}
        for moment in ("loaded", "trained"):
            assert report[moment]["divided"] == report[moment]["of"]
            assert report[moment]["held"] == pytest.approx(report[moment]["whole"] / 4, rel=0.01)
    alone = json.loads((folder / "alone" / "rank-0.json").read_text())
    assert alone["loaded"]["divided"] == 0 and alone["loaded"]["held"] == reports[0]["loaded"]["whole"]


@pytest.mark.parametrize("place", [".", "by-hand"])
def test_saved_model_loads_without_the_shim(model_first, place):
    """Plain transformers reads what the Trainer or the script itself saved, and gives the logits of one process."""
    from transformers import AutoModelForCausalLM

    folder, _ = model_first
    ids = torch.arange(5, 37).unsqueeze(0)
    models = [AutoModelForCausalLM.from_pretrained(folder / name / place) for name in ("alone", "four")]
    with torch.no_grad():
        alone, four = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(four, alone, **CLOSE)


@pytest.mark.parametrize("processes", [pytest.param(4, marks=pytest.mark.sweep), 2])
def test_resuming_a_checkpoint(model_first, processes, tmp_path):
    """From the checkpoint of four processes after two steps, four or two go on as if nothing had been between."""
    folder, script_command = model_first
    (tmp_path / "out").mkdir()
    shutil.copytree(folder / "four" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    losses = tmp_path / "losses.jsonl"
    # Not by larger batches: those of the checkpoint stand on 4.x, whatever the arguments say.
    outputs = ["--output", str(tmp_path / "out"), "--losses", str(losses), "--accumulation", str(4 // processes)]
    environment = {"BALANCE_MODE": "zero3", "BALANCE_NPROC": str(processes)}
    command = [sys.executable, *SHIM, *script_command, *outputs, "--resume"]
    run_command(command, environment).expect_success()
    assert read_losses(losses) == pytest.approx(read_losses(folder / "four.jsonl"), **SAME)


@pytest.mark.exhaustive
def test_half_precision_weights_stay_so(tiny, tmp_path):
    """A model loaded as bfloat16, and no word of precision in the arguments: DeepSpeed trains it as bf16."""
    command = [str(SCRIPTS / "model_first.py"), "--model", str(tiny), "--data", str(assets.text_file())]
    outputs = ["--output", str(tmp_path), "--losses", str(tmp_path / "l.jsonl"), "--dtype", "bfloat16", "--steps", "2"]
    outcome = run_command([sys.executable, *SHIM, *command, *outputs], TWO).expect_success()
    assert "DeepSpeed trains it as bf16" in outcome.stderr
    assert len(read_losses(tmp_path / "l.jsonl")) == 2
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118


def logs_alone_and_on_two_ranks(script, more, folder, alone=(), **variables):
    """What a small model's script logs in one process (which gets the words `alone`, too) and in two under the shim."""
    logged = []
    for name, prefix, environment in (("alone", [], {}), ("two", SHIM, {**TWO, **variables})):
        losses = folder / f"{name}.jsonl"
        outputs = ["--output", str(folder / name), "--losses", str(losses)]
        arguments = [*more, "--batch-size", "1"] if prefix else [*more, "--batch-size", "2", *alone]
        outcome = run_command([sys.executable, *prefix, str(SCRIPTS / script), *arguments, *outputs], environment)
        outcome.expect_success()
        logged.append([json.loads(line) for line in losses.read_text().splitlines()])
    return (*logged, outcome.stderr)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", sampled(["llava", "qwen --frozen", "qwen3", "audio"], "qwen3", mark="sweep"))
def test_pictures_in_some_batches_only(kind, tmp_path):
    """A rank without pictures or sound runs the tower with the others; losses and gradients are those of one process.

    Ranks have different numbers of labels, and the classes (on 4.51 both) take the mean of their own: the loss is the
    mean over all ranks' labels all the same.
    """
    if not hasattr(transformers, "Qwen3VLConfig") and kind == "qwen3":
        pytest.skip("the class came with transformers 4.57")
    alone, two, stderr = logs_alone_and_on_two_ranks("pictures.py", ["--uneven", "--kind", *kind.split()], tmp_path)
    for key, tolerance in (("loss", SAME), ("grad_norm", {"rel": 1e-4})):
        assert [entry[key] for entry in two if key in entry] == pytest.approx(
            [r[key] for r in alone if key in r], **tolerance
        )
    assert len([entry for entry in two if "loss" in entry]) == 4
    assert stderr.count("some ranks have batches without pictures") == 1


@pytest.mark.exhaustive
def test_cross_attention_to_pictures_in_some_batches_only(tmp_path):
    """A model that skips layers without pictures (Mllama) learns what one process learns from the batches in turn."""
    in_turn = ["--batch-size", "1", "--accumulation", "2"]
    alone, two, stderr = logs_alone_and_on_two_ranks("pictures.py", ["--kind", "mllama"], tmp_path, in_turn)
    for key, tolerance in (("loss", SAME), ("grad_norm", {"rel": 1e-4})):
        of_one, of_two = ([entry[key] for entry in entries if key in entry] for entries in (alone, two))
        assert len(of_one) == 4 and of_two == pytest.approx(of_one, **tolerance), key
    assert stderr.count("some ranks have batches without pictures") == 1


@pytest.mark.exhaustive
def test_experts_that_a_rank_does_not_need(tmp_path):
    """Where experts stand in a list, ranks leave out different ones, and learn what one process learns."""
    alone, two, stderr = logs_alone_and_on_two_ranks("experts.py", [], tmp_path)
    assert [entry["loss"] for entry in two if "loss" in entry] == pytest.approx(
        [r["loss"] for r in alone if "loss" in r], **SAME
    )
    listed = Version(transformers.__version__) < Version("5")
    assert (two[-1]["experts_left_out"] > 0) == ("DeepseekV3MoE: experts are gathered together" in stderr) == listed


@pytest.mark.exhaustive
@pytest.mark.parametrize("offload", ["none", "all"])
def test_a_teacher_offloading_and_what_the_variables_say(offload, tmp_path):
    """A model that no Trainer trains is gathered; clipping and time-outs go where they have to; ties stay ties."""
    variables = {
        "BALANCE_OFFLOAD": offload,
        "BALANCE_ZERO_CONFIG": '{"gradient_clipping": 0.05}',
        **recipes.commands("NCCL time-outs")[1].variables,
    }
    models.saved_llama(tmp_path / "model", tie_word_embeddings=True)
    arguments = ["--model", str(tmp_path / "model")]
    alone, two, stderr = logs_alone_and_on_two_ranks("teacher.py", arguments, tmp_path, ["--clip", "0.05"], **variables)
    for key in ("loss", "grad_norm"):
        of_one, of_two = ([entry[key] for entry in entries if key in entry] for entries in (alone, two))
        assert len(of_one) == 3 and of_two == pytest.approx(of_one, rel=1e-4), key
    assert "BALANCE_ZERO_CONFIG overrides the script: max_grad_norm=0.05 instead of 1.0" in stderr
    assert two[-1] == {"ddp_timeout": 7200, "group": 7200.0}
    from safetensors.torch import load_file

    weights = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("alone", "two")]
    assert "lm_head.weight" not in weights[0]
    expect_same_weights(weights[1], weights[0])


@pytest.mark.exhaustive
def test_folders_that_a_script_makes_for_itself(tmp_path):
    """All ranks train into the first one's folder, plain models are written where each rank has them, and load there.

    The script's own time-out is that of the process group, although the group was there before the arguments.
    """
    models.saved_llama(tmp_path / "model")
    command = [str(SCRIPTS / "own_folders.py"), "--model", str(tmp_path / "model")]
    command += ["--report", str(tmp_path / "report")]
    run_command([sys.executable, *SHIM, *command], TWO).expect_success()
    first, second = (json.loads((tmp_path / f"report.{rank}").read_text()) for rank in (0, 1))
    assert first["own"] != second["own"]
    for name in ("output_dir", "run_name", "checkpoints", "layers", "timeout"):
        assert first[name] == second[name], name
    assert first["checkpoints"] == ["checkpoint-1", "checkpoint-2"] and first["timeout"] == 555


@pytest.mark.exhaustive
def test_a_script_that_looks_at_its_weights(tmp_path):
    """Sizes and values are those of whole weights, what is written to them is trained, and no vocabulary shrinks.

    A backward pass to a weight that nothing trains yet, whose gradient would be lost, ends in one line.
    """
    models.saved_llama(tmp_path / "model")
    alone, two, _ = logs_alone_and_on_two_ranks("weights.py", ["--model", str(tmp_path / "model")], tmp_path)
    refused = two[-1].pop("with gradients")
    assert alone[-1].pop("with gradients") == "computed"
    assert "the backward pass comes to `linear` of a partitioned weight" in refused
    for name, value in alone[-1].items():
        assert two[-1][name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name
    assert [entry["loss"] for entry in two if "loss" in entry] == pytest.approx(
        [entry["loss"] for entry in alone if "loss" in entry], **SAME
    )
    from safetensors.torch import load_file

    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "two")]
    expect_same_weights(weights[1], weights[0])


@pytest.mark.exhaustive
def test_a_loop_of_the_scripts_own(tmp_path):
    """With accelerate it learns what one process learns, and saves whole weights; a bare one is refused in one line."""
    models.saved_llama(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model")]
    alone, two, stderr = logs_alone_and_on_two_ranks("own_loop.py", arguments, tmp_path)
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in alone], rel=1e-4)
    assert len(two) == 4
    assert "the script's Accelerator trains with DeepSpeed ZeRO-3" in stderr
    from safetensors.torch import load_file

    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "two")]
    expect_same_weights(weights[1], weights[0])
    bare = [*arguments, "--bare", "--output", str(tmp_path / "bare"), "--losses", str(tmp_path / "bare.jsonl")]
    refused = run_command([sys.executable, *SHIM, str(SCRIPTS / "own_loop.py"), *bare], TWO)
    assert refused.exit_code == 1 and "trains in a loop without a Trainer" in refused.stderr


@pytest.mark.exhaustive
def test_a_script_that_copies_and_reads_gradients(tmp_path):
    """Copies, parametrized weights and gradients have the values of one process, and so has a second training, which
    goes on with the script's own optimizer and scheduler."""
    models.saved_llama(tmp_path / "model", num_hidden_layers=2, vocab_size=128)
    alone, two, stderr = logs_alone_and_on_two_ranks("copies.py", ["--model", str(tmp_path / "model")], tmp_path)
    for key, tolerance in (("loss", 1e-4), ("learning_rate", 1e-6), ("grad_norm", 1e-4)):
        of_one, of_two = ([entry[key] for entry in entries if key in entry] for entries in (alone, two))
        assert len(of_one) == 6 and of_two == pytest.approx(of_one, rel=tolerance), key
    assert two[-1].keys() == alone[-1].keys()
    for name, values in alone[-1].items():
        assert two[-1][name] == pytest.approx(values, rel=1e-4), name
    assert stderr.count("the script copies partitioned weights") == 1


@pytest.mark.exhaustive
def test_two_trainers_one_of_which_evaluates_first(tmp_path):
    """Arguments made before, an evaluation before the training, a loss that is a mean: all as in one process."""
    alone, two, _ = logs_alone_and_on_two_ranks("twice.py", [], tmp_path)
    for key, count in (("loss", 4), ("eval_loss", 1), ("grad_norm", 4)):
        of_one, of_two = ([entry[key] for entry in entries if key in entry] for entries in (alone, two))
        assert len(of_one) == count and of_two == pytest.approx(of_one, rel=1e-4), key


def untrained(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny).model.layers[0].self_attn.q_proj.weight


@pytest.mark.exhaustive
def test_adapters_that_the_script_saves_are_whole(tiny, tmp_path):
    """Not empty tensors: the shapes that LoRA gives them, values other than zero, and PEFT reads them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    command = [str(SCRIPTS / "adapters_by_hand.py"), "--model", str(tiny), "--output", str(tmp_path)]
    run_command([sys.executable, *SHIM, *command], TWO).expect_success()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert adapters and all(64 in adapter.shape and adapter.abs().sum() > 0 for adapter in adapters.values())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    expect_same_weights(merged, model.merge_and_unload().state_dict())
    assert (merged["model.layers.0.self_attn.q_proj.weight"] != untrained(tiny)).any()


def nodes_of_torchrun(port):
    """The commands and variables with which a user starts two nodes, one process each."""
    for node in range(2):
        where = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        yield ["-m", "torch.distributed.run", *where, "--nproc-per-node=1"], {"GLOO_SOCKET_IFNAME": "lo"}


def nodes_of_srun(port):
    """What srun tells two tasks on two nodes; nothing else is set but a free port."""
    for node in range(2):
        yield [], {
            "SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "127.0.0.[1-2]", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("nodes", [nodes_of_torchrun, nodes_of_srun], ids=["torchrun", "srun"])
def test_two_nodes(nodes, model_first, tmp_path):
    """Started on two nodes, here both on this machine, the processes that are there make one training."""
    folder, command = model_first
    losses = tmp_path / "losses.jsonl"
    outputs = ["--output", str(tmp_path / "out"), "--losses", str(losses), "--batch-size", "2"]
    started = [
        subprocess.Popen(
            [sys.executable, *launcher, *command, *outputs],
            env=child_environment(
                {**on_python_path(), "BALANCE_MODE": "zero3", "CUDA_VISIBLE_DEVICES": "-1", **variables}
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for launcher, variables in nodes(free_port())
    ]
    errors = [process.communicate(timeout=400)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    assert "starting" not in "".join(errors) and "ZeRO-3 over 2 processes" in errors[0]
    assert read_losses(losses) == pytest.approx(read_losses(folder / "four.jsonl"), **SAME)


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
