"""One small training through each launcher's own command under BALANCE_MODE=zero3, two CPU processes each.

    python -m tests.zero.launchers [NAME ...]     # all, or those named; about half a minute each

Each has to end with the losses of one process at the same global batch, or be refused in one line. A table is printed,
and the exit code is the number of launchers that fail. `test_launchers.py` runs a few of them.
"""

import importlib.util
import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import models
from tests.end_to_end.run import on_python_path, run_command

SCRIPT = Path(__file__).with_name("scripts") / "combinations.py"
PROGRAMS = Path(sysconfig.get_path("scripts"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ACCELERATE = [sys.executable, str(PROGRAMS / "accelerate"), "launch", "--num_machines", "1", "--mixed_precision", "no"]
CONFIG = {"zero_optimization": {"stage": 3, "sub_group_size": 12345}}
SBATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
          "SLURM_NODELIST": "localhost"}  # fmt: skip


@dataclass(frozen=True)
class Launcher:
    """A command that starts a training.

    Attributes:
        command: what runs, before the script; `{folder}` stands for a folder with `ds.json` in it.
        environment: its variables, besides those of mode zero3.
        expected: texts that standard error has to hold.
        absent: texts that it must not hold.
        refused: the line that it has to end with, if it is refused.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    expected: Sequence[str] = ()
    absent: Sequence[str] = ()
    refused: str = ""


STARTS = "starting 2 processes for ZeRO-3"
TWO = {"BALANCE_NPROC": "2"}
LAUNCHERS = {
    "python": Launcher([sys.executable], TWO, [STARTS]),
    "sbatch": Launcher([sys.executable], {**TWO, **SBATCH}, [STARTS]),
    "torchrun": Launcher([*TORCHRUN, "--nproc-per-node=2"], {}, absent=[STARTS]),
    "accelerate, two processes of four": Launcher(
        [*ACCELERATE, "--multi_gpu", "--num_processes", "2"],
        {"BALANCE_NPROC": "4"},
        ["BALANCE_NPROC=4 is ignored: a launcher has started 2 on this machine"],
    ),
    "accelerate, one process": Launcher([*ACCELERATE, "--cpu", "--num_processes", "1"], TWO, [STARTS]),
    "accelerate, DeepSpeed config": Launcher(
        [*ACCELERATE, "--use_deepspeed", "--num_processes", "2", "--deepspeed_config_file", "{folder}/ds.json"],
        expected=["your DeepSpeed config takes precedence"],
    ),
    "accelerate, DeepSpeed stage 2": Launcher(
        [*ACCELERATE, "--use_deepspeed", "--num_processes", "2", "--zero_stage", "2"],
        refused="asks for ZeRO stage 2",
    ),
    "accelerate, FSDP": Launcher(
        [*ACCELERATE, "--use_fsdp", "--num_processes", "2"], refused="accelerate has been started with FSDP"
    ),
}


def losses_of_one(folder: Path) -> dict[str, list[float]]:
    """Train in one process without the shim; make the model that all train from, in `folder`."""
    models.saved_llama(folder / "model", num_hidden_layers=2, vocab_size=128)
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    run_command([sys.executable, *script_command(folder, "one", 2)]).expect_success()
    return dict(json.loads((folder / "one.json").read_text()))


def script_command(folder: Path, name: str, size: int) -> list[str]:
    files = ["--model", str(folder / "model"), "--output", str(folder / name), "--losses", str(folder / f"{name}.json")]
    return [str(SCRIPT), *files, "--batch-size", str(size), "--only", "full"]


def run(name: str, folder: Path, expected: dict[str, list[float]]) -> None:
    """Train through the launcher `name`, or be refused.

    Raises:
        AssertionError: neither, or with other losses.
    """
    launcher = LAUNCHERS[name]
    environment = {**on_python_path(), "BALANCE_MODE": "zero3", "BALANCE_NCCL_TIMEOUT": "120", **launcher.environment}
    command = [argument.format(folder=folder) for argument in launcher.command]
    file = name.replace(" ", "-")
    outcome = run_command([*command, *script_command(folder, file, 1)], environment)
    if launcher.refused:
        lines = {line for line in outcome.stderr.splitlines() if launcher.refused in line and "balance_shim:" in line}
        assert outcome.exit_code != 0 and len(lines) == 1, outcome.tail()
        assert not (folder / f"{file}.json").exists()
        return
    outcome.expect_success()
    for text in (*launcher.expected, "ZeRO-3 over 2 processes"):
        assert text in outcome.stderr, outcome.tail()
    for text in launcher.absent:
        assert text not in outcome.stderr, outcome.tail()
    assert outcome.stderr.count("ZeRO-3 over") == 1, outcome.tail()
    assert json.loads((folder / f"{file}.json").read_text())["full"] == pytest.approx(expected["full"], rel=2e-5)


TRL_ROWS = {
    "sft": lambda n: {"text": text(n, 24)},
    "dpo": lambda n: {"prompt": text(n, 8), "chosen": " " + text(n + 1, 12), "rejected": " " + text(n + 2, 6)},
    "reward": lambda n: {"chosen": text(n + 1, 12), "rejected": text(n + 2, 6)},
}


def text(start: int, length: int) -> str:
    return " ".join(f"w{(start * 7 + place) % 120}" for place in range(length))


def run_trl(trainer: str, folder: Path) -> None:
    """Train by `trl sft` and its like, in two processes, and by the script behind it in one.

    Raises:
        AssertionError: it fails, or its losses are not those of one process.
    """
    import trl

    model = model_with_tokenizer(folder / "with-tokenizer")
    (folder / trainer).mkdir()
    examples = [json.dumps(TRL_ROWS[trainer](number)) for number in range(16)]
    (folder / trainer / "train.jsonl").write_text("\n".join(examples))
    options = ["--model_name_or_path", str(model), "--dataset_name", str(folder / trainer), "--max_steps", "3",
               "--logging_steps", "1", "--report_to", "none", "--bf16", "false", "--save_strategy", "no"]  # fmt: skip
    scripts = Path(trl.__file__).parent / "scripts"
    alone = [sys.executable, str(scripts / f"{trainer}.py"), *options, "--per_device_train_batch_size", "2"]
    one = run_command([*alone, "--output_dir", str(folder / f"{trainer}-one")]).expect_success()
    command = [sys.executable, str(PROGRAMS / "trl"), trainer, *options, "--per_device_train_batch_size", "1"]
    environment = {**on_python_path(), "BALANCE_MODE": "zero3", "BALANCE_NPROC": "2", "BALANCE_NCCL_TIMEOUT": "120"}
    two = run_command([*command, "--output_dir", str(folder / f"{trainer}-two")], environment).expect_success()
    assert two.stderr.count("ZeRO-3 over 2 processes") == 1, two.tail()
    expected = logged(one.stdout)
    assert len(expected) == 3 and logged(two.stdout) == pytest.approx(expected, rel=1e-3), (expected, two.tail())


AXOLOTL = """\
base_model: {model}
datasets: [{{path: {folder}/axolotl.jsonl, ds_type: json, type: completion}}]
dataset_prepared_path: {folder}/prepared
shuffle_merged_datasets: false
output_dir: {output}
micro_batch_size: {size}
sequence_len: 64
max_steps: 3
num_epochs: 1
gradient_accumulation_steps: 1
optimizer: adamw_torch
lr_scheduler: constant
learning_rate: 0.001
attn_implementation: sdpa
bf16: false
logging_steps: 1
save_strategy: "no"
"""


def run_axolotl(folder: Path) -> None:
    """Train by `axolotl train` in two processes and, by its `--launcher python`, in one; the saved weights agree.

    axolotl 0.21 needs a torch without CUDA where there is no GPU.

    Raises:
        AssertionError: it fails, or its losses or weights are not those of one process.
    """
    model = model_with_tokenizer(folder / "with-tokenizer")
    (folder / "axolotl.jsonl").write_text("\n".join(json.dumps({"text": text(number, 24)}) for number in range(16)))
    outcomes = []
    zero3 = {**on_python_path(), "BALANCE_MODE": "zero3", "BALANCE_NPROC": "2", "BALANCE_NCCL_TIMEOUT": "120"}
    for name, size, options, variables in (("one", 2, ["--launcher", "python"], {}), ("two", 1, [], zero3)):
        config = folder / f"axolotl-{name}.yml"
        config.write_text(AXOLOTL.format(model=model, folder=folder, output=folder / f"axolotl-{name}", size=size))
        own = {"AXOLOTL_DO_NOT_TRACK": "1", "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"}
        command = [sys.executable, str(PROGRAMS / "axolotl"), "train", str(config), *options]
        outcomes.append(run_command(command, {**own, **variables}).expect_success())
    one, two = outcomes
    assert (two.stdout + two.stderr).count("ZeRO-3 over 2 processes") == 1, two.tail()
    expected = logged(one.stdout + one.stderr)
    assert len(expected) == 3 and logged(two.stdout + two.stderr) == pytest.approx(expected, rel=1e-3), two.tail()
    from safetensors.torch import load_file

    alone, shared = (load_file(folder / f"axolotl-{name}" / "model.safetensors") for name in ("one", "two"))
    assert {key: tensor.shape for key, tensor in shared.items()} == {key: tensor.shape for key, tensor in alone.items()}
    assert all(tensor.allclose(alone[key], rtol=1e-3, atol=1e-4) for key, tensor in shared.items())


def logged(stdout: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"'loss': '?([-\d.e]+)", stdout)]


def model_with_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(124))]
    inner = Tokenizer(kinds.WordLevel({word: place for place, word in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    models.saved_llama(folder, num_hidden_layers=2, vocab_size=128, pad_token_id=0)
    return folder


def main(names: Sequence[str]) -> int:
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        expected = losses_of_one(folder) if not names or set(names) & set(LAUNCHERS) else {}
        with_axolotl = ["axolotl"] if importlib.util.find_spec("axolotl") else []
        for name in names or [*LAUNCHERS, *(f"trl {trainer}" for trainer in TRL_ROWS), *with_axolotl]:
            try:
                if name == "axolotl":
                    run_axolotl(folder)
                elif name.startswith("trl "):
                    run_trl(name.removeprefix("trl "), folder)
                else:
                    run(name, folder, expected)
                refused = name in LAUNCHERS and LAUNCHERS[name].refused
                print(f"| {name} | {'refused' if refused else 'same losses'} |", flush=True)
            except AssertionError as error:
                failures += 1
                print(f"| {name} | FAILED |\n{error}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
