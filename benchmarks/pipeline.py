"""Compare simulated step times with and without micro-batches in flight to the ideal of a pipeline.

    python -m benchmarks.pipeline [--devices 4xRTX4090] [--model small|7B] [--micro-batches 8] [--tuning lora]

Each row is a training of two steps on simulated devices, shapes only, in a process of its own: an unmodified script,
the library's hooks or those of the shim, and the clock of `balance_shim.simulation`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODELS = {
    "small": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16,
              "num_key_value_heads": 4, "vocab_size": 32000},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064},
}  # fmt: skip


def train(options: argparse.Namespace) -> None:
    """Train in this process, and print the time of a step as JSON."""
    import torch
    import transformers

    import balance_shim  # noqa: F401 - armed by its import
    from balance_shim import simulation
    from tests.simulation.sparse_checkpoint import write_sparse_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        config = transformers.Qwen2Config(**MODELS[options.model], max_position_embeddings=32768)
        write_sparse_checkpoint(config, folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype=torch.bfloat16)
        if options.tuning == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        ids = torch.randint(0, 500, (2 * options.micro_batches, options.tokens))
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=1, gradient_accumulation_steps=options.micro_batches,
            max_steps=2, report_to=[], save_strategy="no", optim="adamw_torch_fused", disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(
            model=model, args=arguments, train_dataset=[{"input_ids": sequence, "labels": sequence} for sequence in ids]
        ).train()
    time = simulation.step_time()
    assert time is not None, "the kind of the devices is unknown"
    print(json.dumps({"seconds": time.seconds, "busy": time.busy, "bound": time.bound}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="4xRTX4090")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options)
        return
    count = sum(int(part.partition("x")[0]) for part in options.devices.split("+"))
    rows = [("transformers' auto", {"BALANCE_MODE": "off"}), ("balanced", {})]
    rows += [
        (f"balanced, {size} in flight", {"BALANCE_PIPELINE": str(size)})
        for size in sorted({1, options.micro_batches // 2, options.micro_batches})
    ]
    print(f"{options.model}, {options.tuning}, {options.micro_batches} x {options.tokens} tokens, {options.devices}")
    first = None
    for name, variables in rows:
        result = _in_a_process(options, variables)
        first = first or result["seconds"]
        busy = " ".join(f"{share:.0%}" for share in result["busy"])
        print(
            f"{name:24} {result['seconds']:8.3f} s  {first / result['seconds']:5.2f}x  {result['bound']:24} {busy}",
            flush=True,
        )
    most = options.micro_batches
    print(f"ideal {count} devices, {most} in flight: {count * most / (most + count - 1):.2f}x one device at a time")


def _in_a_process(options: argparse.Namespace, variables: dict[str, str]) -> dict:
    command = [sys.executable, "-m", "benchmarks.pipeline", "--train", *sys.argv[1:]]
    variables = {
        "BALANCE_SIMULATE": f"{options.devices}:shapes", "PYTHONPATH": f"{ROOT / 'shim'}:{ROOT}",
        "OMP_NUM_THREADS": "1", "BALANCE_SEQ_LEN": str(options.tokens), "BALANCE_REPORT": "off", **variables,
    }  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **variables}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"seconds"'))
    return json.loads(line)


if __name__ == "__main__":
    main()
