"""The clock's controls, its cost, and predicted step times compared with simulated ones.

    python benchmarks/clock.py [--quick]

Everything is arithmetic on events, so the figures are the same on every machine; only the clock's cost is measured.
Needs no GPU. Prints the tables of `docs/measurements.md`.

1. A chain of equal layers: today's hooks, and ideal copies, against N*m/(m+N-1).
2. One device: FLOPs over the peak rate.
3. Models under transformers' map and the balanced map: the step time that `plan` predicts, and what a training on
   simulated devices shows by the same clock.
4. The processor time of a shapes-only training with and without the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
SHIM = HERE.parents[1] / "shim"
sys.path.insert(0, str(SHIM))

LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
CASES = {
    "Llama 7B width, 16 layers, 4 x H100": (16, "4xH100", 1, 2048, False),
    "the same, accumulation 4": (16, "4xH100", 4, 2048, False),
    "the same, checkpointing": (16, "4xH100", 1, 2048, True),
    "Llama 7B width, 16 layers, 2 x RTX 4090": (16, "2x80GiB@RTX4090", 2, 2048, False),
    "Llama 7B width, 8 layers, one A100-80GB": (8, "1xA100-80GB", 2, 4096, False),
}


def chain(devices: int, batches: int, ideal: bool) -> float:
    """Return the speed-up of a chain of equal layers over one device."""
    from balance_shim.device_rules.kinds import kind_named
    from balance_shim.timing.micro_batches import PlacedBlock, Step, time_of
    from balance_shim.timing.rates import HostRates, Operation, rates_of
    from balance_shim.timing.work import INPUTS, PREVIOUS, BlockWork, Pass, Transfer

    layers, size = 16, 2**20
    operation = Operation(flops=10**12, precision="bfloat16")
    hidden = Transfer(PREVIOUS, forward=(1, size), returned=(1, size))
    shared = Transfer(INPUTS, forward=(3, 3 * 2**10))
    work = BlockWork(Pass(((operation, 1),)), Pass(((operation, 2),)), (hidden, shared))
    blocks = tuple(
        PlacedBlock(f"{device}.{layer}", work, device) for device in range(devices) for layer in range(layers)
    )
    step = Step(blocks, BlockWork(), (), batches, in_flight=batches if ideal else 0)
    rates = rates_of(kind_named("H100"))
    assert rates is not None
    host = HostRates(launch=0, view=0, hook=0, copy=0)
    taken = time_of(step, [rates] * devices, host)
    return batches * devices * layers * 3 * rates.seconds(operation) / taken.now


def controls() -> None:
    print("| N | m | ideal N m / (m + N - 1) | copies that wait for events only | today's hooks |")
    print("|---|---|---|---|---|")
    for devices in (2, 4, 8):
        for batches in (devices, 2 * devices, 4 * devices):
            ideal = devices * batches / (batches + devices - 1)
            print(
                f"| {devices} | {batches} | {ideal:.2f} | {chain(devices, batches, True):.2f} | "
                f"{chain(devices, batches, False):.2f} |"
            )


def predicted(layers: int, gpus: str, accumulation: int, length: int, checkpoints: bool) -> float:
    """Return the seconds of a step that `plan` predicts for the balanced map."""
    from transformers import LlamaConfig

    import balance_shim

    config = LlamaConfig(**LLAMA, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    plan = balance_shim.plan(
        config, gpus, seq_len=length, accumulation=accumulation, precision="bf16", gradient_checkpointing=checkpoints,
        loss="chunked", max_memory=None,
    )  # fmt: skip
    assert plan.step_time is not None
    return plan.step_time.seconds


def simulated(case: tuple[int, str, int, int, bool], clocked: bool = True) -> tuple[float | None, float]:
    """Return the seconds of a step by the clock of a simulated training, and its processor time."""
    command = [sys.executable, str(HERE), "--train", json.dumps(case), "--clocked", str(int(clocked))]
    environ = {**os.environ, "PYTHONPATH": str(SHIM), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environ, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    seconds, wall = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, wall


def train(case: tuple[int, str, int, int, bool], clocked: bool) -> None:
    """Train under a balanced map on simulated devices, and print the step time by the clock, and the processor time."""
    import torch

    import balance_shim
    from balance_shim import simulation

    layers, gpus, accumulation, length, checkpoints = case
    spec = simulation.parse_spec(f"{gpus}:shapes")
    if not clocked:
        spec = spec._replace(kinds=())
    simulation.install(spec)
    balance_shim.install(mode="balanced", seq_len=length)
    from accelerate import dispatch_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    device_map = balance_shim.plan(
        config, gpus, seq_len=length, accumulation=accumulation, precision="bf16", gradient_checkpointing=checkpoints,
        loss="chunked",
    ).device_map  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, place in device_map.items():
        model.get_submodule(name).to_empty(device=f"npu:{place}")
    if len(set(device_map.values())) > 1:
        model = dispatch_model(model, device_map={name: f"npu:{place}" for name, place in device_map.items()})
    model.train()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    from balance_shim.logits.head import deferring

    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 32000, (1, length)).to("npu:0")
    times = []
    for _ in range(4):
        began = time.process_time()
        for _ in range(accumulation):
            with deferring(model):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began)
    step = simulation.step_time()
    print(json.dumps([None if step is None else step.seconds, min(times[1:])]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="controls only")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--clocked", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(tuple(json.loads(options.train)), bool(options.clocked))
        return
    controls()
    if options.quick:
        return
    print("\n| training | predicted by plan | simulated | difference |\n|---|---|---|---|")
    for name, case in CASES.items():
        plan_seconds, (clock_seconds, _) = predicted(*case), simulated(case)
        assert clock_seconds is not None
        figures = (
            f"{plan_seconds * 1e3:.0f} ms | {clock_seconds * 1e3:.0f} ms | {plan_seconds / clock_seconds - 1:+.1%}"
        )
        print(f"| {name} | {figures} |", flush=True)
    case = CASES["Llama 7B width, 16 layers, 4 x H100"]
    walls = {clocked: min(simulated(case, clocked)[1] for _ in range(3)) for clocked in (False, True)}
    print(
        f"\nA step of 16 layers on shapes only: {walls[False]:.2f} s without the clock, {walls[True]:.2f} s with it "
        f"({walls[True] / walls[False] - 1:+.1%})"
    )


if __name__ == "__main__":
    main()
