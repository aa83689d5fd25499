"""The predicted peak of one real device beside the one that torch measures there.

    python benchmarks/cuda_truth.py                     on the accelerator of this machine
    python benchmarks/cuda_truth.py --simulate 80GiB    on a simulated one: shows that the script works, proves nothing

Models of published sizes with random weights, each trained for three steps by a plain Trainer in a process of its own;
what is compared is `max_memory_allocated` with the peak that the plan predicts for the same workload. The table goes
to standard output as Markdown, and with --output into a file beside the versions and the device.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

MIB = 2**20
COMMON = {"tie_word_embeddings": True, "max_position_embeddings": 32768}
MODELS = {
    "Qwen2.5-0.5B": ("Qwen2Config", {**COMMON, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936}),
    "Llama-3.2-1B": ("LlamaConfig", {**COMMON, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
    "Qwen2.5-1.5B": ("Qwen2Config", {**COMMON, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                     "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}),
    "Qwen3-1.7B": ("Qwen3Config", {**COMMON, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}),
    "Mistral-7B, 8 layers": ("MistralConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8,
                             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768}),
}  # fmt: skip
WORKLOADS = {
    "full": {"seq_len": 2048},
    "full, checkpointing": {"seq_len": 4096, "gradient_checkpointing": True},
    "LoRA": {"seq_len": 2048, "tuning": "lora"},
    "fp32 weights, bf16 autocast, accumulation 2": {"seq_len": 1024, "autocast": True, "accumulation": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--simulate", metavar="SIZE", help="on one simulated device of this size, shapes only")
    parser.add_argument("--output", type=Path, help="a file for the table")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case, options.simulate)))
        return
    rows, facts = [], {}
    for model in options.models:
        for workload in WORKLOADS:
            print(f"{model}, {workload}", file=sys.stderr)
            words = [sys.executable, __file__, "--case", model, workload]
            words += ["--simulate", options.simulate] if options.simulate else []
            done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "BALANCE_MODE": "off"})
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                rows.append((model, workload, None, None))
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            facts = found["facts"]
            rows.append((model, workload, found["predicted"], found["measured"]))
    text = table(rows, facts)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def measure(name: str, title: str, simulate: str | None) -> dict:
    """Train and return predicted and measured peak in bytes."""
    import torch
    import transformers

    from balance_shim import simulation
    from balance_shim.devices import Device
    from balance_shim.memory.workload import Workload
    from balance_shim.placement import planner
    from balance_shim.placement.plan import evaluate

    if simulate:
        simulation.install(simulation.parse_spec(f"1x{simulate}:shapes"))
    kind = torch.accelerator.current_accelerator().type
    module = torch.get_device_module(kind)
    config_class, sizes = MODELS[name]
    asked = WORKLOADS[title]
    dtype = torch.float32 if asked.get("autocast") else torch.bfloat16
    config = getattr(transformers, config_class)(**sizes)

    def build(device: str) -> torch.nn.Module:
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)

    workload = Workload(**asked, optimizer="adamw_torch_fused")
    request = planner.Request(build("meta"), workload, (Device(0, f"{kind}:0", 1 << 50, 1 << 50),))
    costed = planner.cost(request)
    plan = evaluate("balanced", costed, {block.name: 0 for block in costed.blocks}, request.devices)

    model = build(f"{kind}:0")
    if workload.tuning == "lora":
        import peft

        layers = [each for each, part in model.named_modules() if type(part) is torch.nn.Linear and each != "lm_head"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=layers))
    arguments = transformers.TrainingArguments(
        output_dir="trained", max_steps=3, per_device_train_batch_size=1, report_to=[], save_strategy="no",
        optim=workload.optimizer, gradient_accumulation_steps=workload.accumulation, bf16=workload.autocast,
        gradient_checkpointing=workload.gradient_checkpointing, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 30000, (6, workload.seq_len))]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    module.reset_peak_memory_stats(0)
    trainer.train()
    facts = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts["device"] = module.get_device_properties(0).name
    return {"predicted": plan.worst.predicted_peak, "measured": module.max_memory_allocated(0), "facts": facts}


def table(rows: list, facts: dict) -> str:
    """Return the figures as a Markdown table, with the median and the worst error."""
    lines = ["| model | workload | predicted MiB | measured MiB | error |", "|---|---|---:|---:|---:|"]
    errors = []
    for model, workload, predicted, measured in rows:
        if predicted is None:
            lines.append(f"| {model} | {workload} | failed | | |")
            continue
        errors.append(predicted / measured - 1)
        figures = f"{predicted / MIB:.0f} | {measured / MIB:.0f} | {errors[-1]:+.1%}"
        lines.append(f"| {model} | {workload} | {figures} |")
    sizes = sorted(map(abs, errors))
    if sizes:
        summary = f"Error: median {sizes[len(sizes) // 2]:.1%}, worst {sizes[-1]:.1%}."
        lines += ["", f"{summary} {', '.join(f'{key} {value}' for key, value in facts.items())}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
