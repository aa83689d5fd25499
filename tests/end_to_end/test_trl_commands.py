"""TRL's own command, which starts another process to train in: one process, four simulated devices, losses of one."""

import importlib.util
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tests.end_to_end.run import OFFLINE
from tests.processes import REPOSITORY, SHIM, python
from tests.sampling import sampled

pytestmark = pytest.mark.skipif(
    Version(version("trl")) < Version("1.16"), reason="before 1.16 the command has other options and no fused heads"
)

# Loads the model as the command does, on one device; the last argument is the folder of the script.
IN_ONE_PROCESS = """
import runpy, sys, json
for script, words in json.loads(sys.argv[1]):
    print("START", script.rpartition("/")[2], flush=True)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
"""
REWARDS = "def length(completions, **_):\n    return [float(len(each) % 7) for each in completions]\n"
ROWS = {
    "sft": lambda text, n: {"text": text(n, 24)},
    "dpo": lambda text, n: {"prompt": text(n, 8), "chosen": " " + text(n + 1, 12), "rejected": " " + text(n + 2, 6)},
    "kto": lambda text, n: {"prompt": text(n, 8), "completion": " " + text(n + 1, 12), "label": n % 2 == 0},
    "grpo": lambda text, n: {"prompt": text(n, 8)},
}
MORE = {"grpo": ["--reward_funcs", "own_rewards.length", "--num_generations", "2", "--max_completion_length", "8"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with a tokenizer, rows for each trainer, and a reward function."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("trl")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"word{number}" for number in range(300))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=304, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for what, row in ROWS.items():
        (folder / what).mkdir()
        lines = [json.dumps(row(_text, number)) for number in range(16)]
        (folder / what / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "own_rewards.py").write_text(REWARDS)
    return folder


def _text(start, length):
    return " ".join(f"word{(start * 7 + place) % 300}" for place in range(length))


def _arguments(folder, what):
    options = {
        "model_name_or_path": folder / "model", "dataset_name": folder / what, "max_steps": 3, "logging_steps": 1,
        "per_device_train_batch_size": 2, "report_to": "none", "bf16": "false", "save_strategy": "no",
        "output_dir": folder / f"out-{what}",
    }  # fmt: skip
    return [
        *(argument for name, value in options.items() for argument in (f"--{name}", str(value))),
        *MORE.get(what, []),
    ]


@pytest.fixture(scope="module")
def on_one_device(folder):
    """Trainer -> losses and gradient norms of its script on one device, without the shim."""
    spec = importlib.util.find_spec("trl")
    scripts = Path(spec.origin).parent / "scripts"
    todo = json.dumps([(str(scripts / f"{what}.py"), _arguments(folder, what)) for what in ROWS])
    done = _run(folder, "-c", "import balance_shim\n" + IN_ONE_PROCESS, todo, gpus="1x2GiB", mode="off")
    parts = re.split(r"START (\w+)\.py", done.stdout)
    return {what: _figures(part) for what, part in zip(parts[1::2], parts[2::2], strict=True)}


def _run(folder, *arguments, gpus, mode):
    variables = {**OFFLINE, "OMP_NUM_THREADS": "1", "BALANCE_SIMULATE": gpus, "BALANCE_MODE": mode}
    done = python(*arguments, paths=(SHIM, REPOSITORY / "sitecustomize_example", folder), timeout=300, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def _figures(text):
    return [tuple(map(float, pair)) for pair in re.findall(r"'loss': '?([-\d.e]+)'?, 'grad_norm': '?([\d.e-]+)", text)]


@pytest.mark.parametrize("what", sampled(ROWS, "sft", "dpo"))
def test_the_command_trains_on_four_devices_with_the_figures_of_one(folder, on_one_device, what):
    """Losses and gradient norms of three steps are those of one device; no step had to be repeated."""
    start = "import sys; from trl.cli.main import main; sys.argv[0] = 'trl'; sys.exit(main())"
    arguments = [what, *_arguments(folder, what), "--num_processes", "1"]
    done = _run(folder, "-c", start, *arguments, gpus="4x2GiB", mode="balanced")
    expected = on_one_device[what]
    assert len(expected) == 3
    for actual, wanted in zip(_figures(done.stdout), expected, strict=True):
        assert actual == pytest.approx(wanted, rel=1e-2, abs=1e-5)
    assert "model.layers" in done.stderr or "layers." in done.stderr
    assert "met on different devices" not in done.stderr
