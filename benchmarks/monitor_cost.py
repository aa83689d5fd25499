"""What watching memory costs: the time that the monitor itself takes, beside the time of a step.

    python benchmarks/monitor_cost.py                   # on simulated devices; about two minutes on two cores
    python benchmarks/monitor_cost.py --readings N      # only the cost of one reading, on whatever accelerator is there

The step is that of a Llama of 23 million parameters with 2 x 256 tokens, on four devices, and every other step is
watched. The monitor's own time is measured inside it as well, because on a machine with other work a difference of half
a percent between steps cannot be seen.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "shim"), str(REPOSITORY)]

STEPS = 48


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", metavar="FOLDER")
    parser.add_argument("--readings", type=int)
    options = parser.parse_args()
    if options.train:
        _train(Path(options.train))
    elif options.readings:
        _readings(options.readings)
    else:
        _compare()


def _compare() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = _run(folder)
    plain, watched = (statistics.median(run[kind]) for kind in ("plain", "watched"))
    own = run["spent"] / len(run["watched"])
    print("| | |\n| --- | ---: |")
    print(f"| step that is not watched, median of {len(run['plain'])} | {1000 * plain:.1f} ms |")
    print(f"| step that is, median of {len(run['watched'])} | {1000 * watched:.1f} ms |")
    print(f"| the monitor's own time a step | {1000 * own:.3f} ms, {own / plain:.3%} |")
    print(f"| of it one reading of four devices | {1000 * run['reading']:.3f} ms |")


def _run(folder: str) -> dict:
    environ = {name: text for name, text in os.environ.items() if not name.startswith("BALANCE_")}
    environ |= {
        "PYTHONPATH": str(REPOSITORY / "shim"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "BALANCE_SIMULATE": "4x2GiB", "BALANCE_MONITOR": "1", "BALANCE_REPORT": folder,
    }  # fmt: skip
    start = "import balance_shim, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start, __file__, "--train", folder]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(Path(folder, "times.json").read_text())


def _train(folder: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from balance_shim.monitoring import trainer_callback
    from balance_shim.monitoring.readings import Meter

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4096)).save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", device_map="auto", dtype=torch.float32)
    examples = [{"input_ids": [5 + number] * 256, "labels": [5 + number] * 256} for number in range(32)]
    times: dict[bool, list[float]] = {True: [], False: []}
    spent: dict[str, float] = {}

    class Alternating(TrainerCallback):
        """Runs before the monitor's own callback: lets it watch every other step, and times from start to start."""

        began = None

        def on_step_begin(self, args, state, control, **_):
            now, monitor = time.perf_counter(), trainer_callback.monitor_of(trainer)
            if self.began is not None and state.global_step > 2:
                times[monitor.running].append(now - self.began)
            if state.global_step == 2:
                spent["before"] = monitor.spent
            monitor.running = not monitor.running
            spent["spent"] = monitor.spent
            self.began = time.perf_counter()

    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=STEPS + 3, per_device_train_batch_size=2, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[Alternating()])
    trainer.train()
    meter = Meter("npu", range(4))
    figures = {
        "plain": times[False],
        "watched": times[True],
        "spent": spent["spent"] - spent["before"],
        "reading": _time_of(meter.read, 200),
    }
    (folder / "times.json").write_text(json.dumps(figures))


def _readings(number: int) -> None:
    from balance_shim import devices
    from balance_shim.monitoring.readings import Meter

    kind = devices.accelerator_type()
    if kind is None:
        sys.exit("there is no accelerator here")
    meter = Meter(kind, range(devices.count()))
    print(f"{len(meter.names)} devices of type {kind}")
    print(f"reading of all, with what others have: {1e6 * _time_of(meter.read, number):.0f} us")
    print(f"without: {1e6 * _time_of(lambda: meter.read(with_others=False), number):.0f} us")


def _time_of(function, number: int) -> float:
    seconds = []
    for _ in range(number):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
