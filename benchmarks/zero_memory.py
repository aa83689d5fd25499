"""Memory of each process under BALANCE_MODE=zero3 with 1, 2 and 4 processes, beside DeepSpeed's own estimate.

    python benchmarks/zero_memory.py [--processes 1 2 4] [--hidden 1024] [--layers 8]

Real DeepSpeed on CPU processes with gloo. Each trains a Llama of random weights in float32 for three steps with AdamW,
and reports what it held in tensors between two steps (weights, gradients, master weights, optimizer state) and the most
that its resident memory grew after the libraries had been imported. A line c + b/N is fitted to each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()
SHIM = HERE.parents[1] / "shim"
MIB = 1 << 20
TOKENS = 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank-report", help=argparse.SUPPRESS)
    return parser.parse_args()


def train(options: argparse.Namespace) -> None:
    """Be one process of a training, and write what it held."""
    import gc
    import resource

    import psutil
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

    arguments = TrainingArguments(
        output_dir=options.rank_report, max_steps=3, per_device_train_batch_size=1, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_steps=10,
    )  # fmt: skip
    before = psutil.Process().memory_info().rss
    report: dict[str, int] = {}

    class Counting(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            gc.collect()
            storages = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in gc.get_objects()
                if isinstance(tensor, torch.Tensor)
                and tensor.device.type == "cpu"
                # A partitioned weight shows its full shape, and would be gathered to be counted; its partition counts.
                and not hasattr(tensor, "ds_tensor")
            }
            report["tensors"] = sum(storages.values())

    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=16384,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    examples = [{"input_ids": torch.arange(TOKENS), "labels": torch.arange(TOKENS)}] * 16
    Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[Counting()]).train()
    report["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    report["parameters"] = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    report["largest"] = max(
        sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters(recurse=False))
        for module in model.modules()
    )
    Path(options.rank_report, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(report))


def measure(options: argparse.Namespace, count: int) -> list[dict[str, int]]:
    """Return the reports of the `count` processes of one training."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "PYTHONPATH": str(SHIM), "BALANCE_MODE": "zero3", "BALANCE_NPROC": str(count)}
        arguments = ["--hidden", str(options.hidden), "--layers", str(options.layers), "--rank-report", folder]
        command = [sys.executable, "-m", "balance_shim", "run", str(HERE), *arguments]
        subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank-*.json"))]


def estimate(parameters: int, largest: int, count: int) -> float:
    """Return what DeepSpeed's estimator says of a process's host memory, everything kept there, in bytes.

    Its formula for the device counts half-precision weights and float32 states, 18 bytes per parameter.
    """
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()):
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

        _, device, _ = estimate_zero3_model_states_mem_needs(
            total_params=parameters, largest_layer_params=largest, num_gpus_per_node=count, cpu_offload=False,
            cpu_offload_params=False, zero_init=True,
        )  # fmt: skip
    return float(device)


def fit(counts: list[int], sizes: list[float]) -> tuple[float, float]:
    """Return (c, b) of the line c + b/N that is nearest to `sizes` by least squares."""
    inverse = [1 / count for count in counts]
    mean, level = sum(inverse) / len(inverse), sum(sizes) / len(sizes)
    spread = sum((x - mean) ** 2 for x in inverse)
    slope = sum((x - mean) * (y - level) for x, y in zip(inverse, sizes, strict=True)) / spread if spread else 0.0
    return level - slope * mean, slope


def main() -> None:
    options = parse()
    if options.rank_report:
        train(options)
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    reports = {count: measure(options, count) for count in options.processes}
    parameters, largest = (reports[options.processes[0]][0][name] for name in ("parameters", "largest"))
    print(f"Llama with {parameters / 1e6:.0f} M parameters in float32, AdamW, {TOKENS} tokens; MiB per process\n")
    print("| processes | tensors between steps, least to most | resident memory, most | DeepSpeed's estimate |")
    print("|---|---|---|---|")
    for count, rank_reports in reports.items():
        held = sorted(rank_report["tensors"] for rank_report in rank_reports)
        most = max(rank_report["resident"] for rank_report in rank_reports)
        estimated = estimate(parameters, largest, count)
        print(
            f"| {count} | {held[0] / MIB:,.0f} to {held[-1] / MIB:,.0f} | {most / MIB:,.0f} | {estimated / MIB:,.0f} |"
        )
    print()
    for name, title in (("tensors", "tensors"), ("resident", "resident")):
        sizes = [max(rank_report[name] for rank_report in rank_reports) for rank_reports in reports.values()]
        constant, slope = fit(list(reports), sizes)
        worst = max(abs(constant + slope / n - size) / size for n, size in zip(reports, sizes, strict=True))
        print(
            f"{title}: {constant / MIB:,.0f} MiB + {slope / MIB:,.0f} MiB / N "
            f"({slope / parameters:.1f} bytes per parameter); off by at most {worst:.1%}"
        )


if __name__ == "__main__":
    main()
