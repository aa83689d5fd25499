"""Asks for everything that ZeRO-3 refuses, one after the other, as one rank.

python refused.py --model FOLDER --output FILE

Writes one JSON object: the key of a combination -> the class and the text of the error that it ended with.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
options = parser.parse_args()
folder = Path(options.output).parent


def load(**more):
    return AutoModelForCausalLM.from_pretrained(options.model, **more)


def arguments(**more):
    return TrainingArguments(output_dir=str(folder / "out"), report_to=[], **more)


def with_parallelism_config():
    """As the argument has it where transformers knows one, else as an attribute that is looked at."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    if "parallelism_config" in names:
        from accelerate.parallelism_config import ParallelismConfig

        return arguments(parallelism_config=ParallelismConfig())
    from accelerate import Accelerator

    return Accelerator(parallelism_config=object())


@contextlib.contextmanager
def variables(**more):
    os.environ.update(more)
    try:
        yield
    finally:
        for name in more:
            del os.environ[name]


def accelerate_launch():
    with variables(ACCELERATE_USE_FSDP="true"):
        arguments()


def other_plugin():
    from accelerate import Accelerator

    Accelerator(fsdp_plugin=object())


def one_device():
    """As a program that nobody has launched, on a machine with one device."""
    from balance_shim import devices
    from balance_shim.zero.launching import relaunch

    ranks = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    count, devices.count = devices.count, lambda: 1
    try:
        relaunch.ensure_launched()
    finally:
        os.environ.update(ranks)
        devices.count = count


def launcher_trains():
    """As in the process of a program that starts the ranks."""
    from transformers import Trainer

    from balance_shim.modes.launcher import ZeroLauncher

    ZeroLauncher().before_trainer(Trainer.__init__, (None,), {})


def weights_in_loss():
    weight = load().lm_head.weight
    torch.nn.functional.linear(torch.ones(1, weight.shape[1]), weight).sum().backward()


def bare_loop():
    """DistributedDataParallel is no engine of DeepSpeed's either."""
    model = load()
    model.train()
    ids = torch.arange(5, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()


def prepared():
    """An Accelerator and what it has prepared: a model, its optimizer, and batches."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model = load()
    accelerator = Accelerator()
    loader = torch.utils.data.DataLoader([{"input_ids": torch.arange(5, 15)}], batch_size=1)
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)


def gradient_used_up():
    accelerator, model, _, loader = prepared()
    ids = next(iter(loader))["input_ids"]
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    _ = model.module.lm_head.weight.grad


def clip_by_torch():
    _, model, _, _ = prepared()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clipping(by):
    accelerator, model, _, _ = prepared()
    (accelerator.clip_grad_norm_ if by == "norm" else accelerator.clip_grad_value_)(model.parameters(), 0.5)


def unconvertible():
    """A checkpoint of three ranks whose files are empty."""
    from balance_shim.zero import resume

    step = folder / "checkpoint-1" / "global_step1"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text(step.name)
    for rank in range(3):
        (step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"")
    resume.prepare(object(), str(step.parent))


def one_rank_alone():
    """One of two ranks, whose other never comes; torch's fake process group has as many as one likes."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg  # registers the backend

    from balance_shim.zero import meeting, process_group

    dist.destroy_process_group()
    del fake_pg
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    process_group.remember_timeout(1.0)
    meeting.meet("save_pretrained")


REFUSED = {
    "fsdp": lambda: arguments(fsdp="full_shard"),
    "accelerate_launch": accelerate_launch,
    "parallelism_config": with_parallelism_config,
    "auto_batch": lambda: arguments(auto_find_batch_size=True),
    "one_device": one_device,
    "launcher_trains": launcher_trains,
    "quantized": lambda: load(quantization_config={"load_in_4bit": True}),
    "tensor_parallel": lambda: load(tp_plan="auto"),
    "other_plugin": other_plugin,
    "weights_data": lambda: load().lm_head.weight.data,
    "weights_in_loss": weights_in_loss,
    "bare_loop": bare_loop,
    "gradient_used_up": gradient_used_up,
    "clip_by_torch": clip_by_torch,
    "clip_by_norm": lambda: clipping("norm"),
    "clip_by_value": lambda: clipping("value"),
    "unconvertible": unconvertible,
    "one_rank_alone": one_rank_alone,
}

outcomes = {}
with contextlib.redirect_stderr(io.StringIO()) as logged:
    load(device_map="auto")
line = next(line for line in logged.getvalue().splitlines() if "device_map" in line)
outcomes["device_map"] = ["loaded", line.removeprefix("balance_shim: ")]
for name, ask in REFUSED.items():
    try:
        ask()
        outcomes[name] = ["nothing", "it went on"]
    except Exception as error:
        outcomes[name] = [type(error).__name__, str(error)]
Path(options.output).write_text(json.dumps(outcomes, indent=1))
