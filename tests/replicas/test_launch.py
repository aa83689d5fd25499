"""Who becomes several ranks, how many these are, what they are given, and how they end."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests import models, processes, recipes
from tests.endings import expect_end, wait_for_ranks
from tests.replicas.running import SCRIPTS, start, train
from tests.sampling import sampled

PATHS = (processes.SHIM, processes.INJECTED)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.saved_llama(tmp_path_factory.mktemp("model") / "model", hidden_size=128, num_hidden_layers=8)


ENDS = {
    "failing rank": ("raises", None, 1, "ValueError: a fault of the user's own"),
    "killed rank": ("killed", None, 137, "rank 1 was ended by SIGKILL"),
    "leaving rank": ("leaves", None, 4, "rank 1"),
    "Ctrl-C": ("waits", signal.SIGINT, 130, "ended by SIGINT"),
    "SIGTERM": ("waits", signal.SIGTERM, 143, "ended by SIGTERM"),
    "killed launcher": ("waits", signal.SIGKILL, -9, ""),
}


@pytest.mark.parametrize("name", sampled(ENDS, "killed rank", mark="sweep"))
def test_the_end_of_one_is_the_end_of_all(name, model, tmp_path):
    """Whatever ends first, within 30 seconds nothing is left of it, and the exit code says that it failed."""
    fault, sent, code, message = ENDS[name]
    variables = {"BALANCE_MODE": "balanced", "BALANCE_REPLICAS": "2", "BALANCE_SIMULATE": "4x256MiB"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "ends.py"), fault, str(model), str(tmp_path)],
        env=processes.environment(*PATHS, OMP_NUM_THREADS="1", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ranks = wait_for_ranks(process)
    if sent is not None:
        os.kill(process.pid, sent)
    stderr = expect_end(process, ranks)
    assert process.returncode == code and message in stderr, stderr[-3000:]


def test_auto_takes_the_most_that_fit(model, tmp_path):
    """The number that it chooses trains on devices of a size on which one more would run out of memory."""
    sizes = {"BALANCE_SIMULATE": "4x24MiB", "BALANCE_RESERVE": "2%", "BALANCE_SEQ_LEN": "96", "BALANCE_BATCH_SIZE": "2"}
    recipe = recipes.commands("Only one GPU is busy")[0].variables
    chosen = train("plain", model, tmp_path / "auto", **recipe, **sizes)
    assert chosen.result["processes"] == 2
    variables = {**sizes, "MICRO_BATCH": "2", "BALANCE_REPLICAS": "4"}
    more = start(sys.executable, SCRIPTS / "trainings.py", "plain", model, tmp_path / "more", **variables)
    assert more.returncode != 0 and "out of memory" in more.stderr
    assert "fewer replicas, each on more devices" in more.stderr


def test_auto_is_one_where_one_fits(model, tmp_path):
    """No process is started where a second replica has no room."""
    sizes = {"BALANCE_SIMULATE": "3x24MiB", "BALANCE_SEQ_LEN": "96", "BALANCE_BATCH_SIZE": "2"}
    chosen = train("plain", model, tmp_path, BALANCE_REPLICAS="auto", **sizes)
    assert chosen.result["processes"] == 1 and "starting" not in chosen.log


def test_a_rank_whose_share_lacks_the_device_of_its_number(model, tmp_path):
    """Two small devices are one share and the large one is the other: inputs, loss and optimizer follow."""
    sizes = {"BALANCE_SIMULATE": "2x48MiB+96MiB"}
    outcome = train("lora", model, tmp_path, BALANCE_REPLICAS="2", **sizes)
    assert "replicas: rank 0 on npu:0+1, rank 1 on npu:2" in outcome.log
    assert outcome.result["devices"] == ["npu:0", "npu:1"] and min(outcome.peaks) > 0


REFUSED = {
    "too many": ({"BALANCE_REPLICAS": "5"}, [], "BALANCE_REPLICAS=5: there are 4 devices to use"),
    "no port": ({"BALANCE_REPLICAS": "2", "MASTER_PORT": "x"}, [], "BALANCE_REPLICAS=2: MASTER_PORT='x' is not a port"),
    "python -c": ({"BALANCE_REPLICAS": "2"}, ["-c"], "python -c cannot be run as several processes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_one_line(name, tmp_path):
    """A number that was asked for and cannot be had ends the program before anything loads."""
    variables, option, expected = REFUSED[name]
    text = "from transformers import TrainingArguments\nTrainingArguments('out')\nprint('went on')\n"
    script = tmp_path / "train.py"
    script.write_text(text)
    done = start(sys.executable, *option, text if option else script, BALANCE_SIMULATE="4x64MiB", **variables)
    assert done.returncode != 0 and "went on" not in done.stdout and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("balance_shim")]
    assert len(lines) == 1 and expected in lines[0], done.stderr[-2000:]


@pytest.mark.parametrize("mode", sampled(["balanced", "auto"], "balanced", mark="sweep"))
def test_a_program_without_training_arguments_becomes_ranks(mode, model, tmp_path):
    """Where its first model is about to load with a device map."""
    script = tmp_path / "loop.py"
    script.write_text(
        "import os, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map='auto')\n"
        "print(os.environ['RANK'], sorted({str(each.device) for each in model.parameters()}), flush=True)\n"
    )
    variables = {"BALANCE_MODE": mode, "BALANCE_REPLICAS": "2", "BALANCE_SIMULATE": "4x256MiB"}
    done = start(sys.executable, script, model, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == ["0 ['npu:0', 'npu:2']", "1 ['npu:1', 'npu:3']"]


def test_models_without_a_map_are_left_alone(model, tmp_path):
    """Plain DDP, each rank with a whole model on the device of its number, stays as it is."""
    script = tmp_path / "train.py"
    script.write_text(
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.arange(32)\n"
        "arguments = TrainingArguments(sys.argv[2], max_steps=2, report_to=[], disable_tqdm=True)\n"
        "trainer = Trainer(model, arguments, train_dataset=[{'input_ids': ids, 'labels': ids}] * 32)\n"
        "trainer.train()\n"
        "print(json.dumps([trainer.args.process_index, str(model.device), str(trainer.args.device)]), flush=True)\n"
    )
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = start(*command, script, model, tmp_path / "out", BALANCE_SIMULATE="3x256MiB")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert lines == [[0, "npu:0", "npu:0"], [1, "npu:1", "npu:1"]] and "replicas:" not in done.stderr
