"""Report folders as a training leaves them, written by hand; what trainings write is tested in tests/monitoring."""

import json

from balance_shim.report import run_record

MIB = 1 << 20
DEVICES = ("cuda:0", "cuda:1")
TERMS = {"weights": 300, "gradients": 100, "optimizer": 200, "activations": 250, "temporary": 50, "overhead": 0}
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip


def step(number, peak=700, **more):
    """Return one line of a record: figures in MiB."""
    devices = {
        name: {
            "allocated": peak // 2 * MIB, "reserved": (peak + 40) * MIB, "peak": (peak + 10 * place) * MIB,
            "others": None, "total": 1000 * MIB, "predicted": 900 * MIB,
        }
        for place, name in enumerate(DEVICES)
    }  # fmt: skip
    return {
        "step": number, "seconds": 0.5, "tokens": 256, "micro_batches": [[2, 128]], "devices": devices, **more,
    }  # fmt: skip


def plan(name="LlamaForCausalLM", **more):
    """Return the content of a plan.json."""
    devices = [
        {
            "name": device, "capacity": 920 * MIB, "predicted_peak": 900 * MIB, "predicted_reserved": 910 * MIB,
            "terms": {term: size * MIB for term, size in TERMS.items()},
        }
        for device in DEVICES
    ]  # fmt: skip
    layers = {f"model.layers.{number}": number // 3 for number in range(6)}
    return {
        "mode": "balanced",
        "model": {"class": name, "parameters": 12_000_000},
        "workload": {
            "batch_size": 2, "seq_len": 64, "accumulation": 1, "tuning": "full", "optimizer": "adamw_torch",
            "gradient_checkpointing": False, "loss": "full", "evaluation": None,
        },
        "devices": devices,
        "device_map": {"model.embed_tokens": 0, **layers, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1},
        "lower_bound": 880 * MIB,
        "notes": [],
        **more,
    }  # fmt: skip


def run(**more):
    """Return the content of a run.json."""
    device = {"overhead": 0, "capability": [8, 0], "runtime": "cuda"}
    devices = [
        {"index": index, "name": name, "available": 40 * MIB, "capacity": 36 * MIB, **device}
        for index, name in enumerate(DEVICES)
    ]
    model = {"number": 1, "class": "LlamaForCausalLM", "source": "", "dtype": "float32", "config": LLAMA}
    return {
        "format": run_record.FORMAT,
        "balance_shim": "0.1.0",
        "started": 1000.0,
        "program": "train.py",
        "mode": "balanced",
        "settings": {"BALANCE_MONITOR": "1"},
        "python": "3.11.7",
        "platform": "Linux",
        "libraries": {"torch": "2.13.0", "transformers": "5.23.0"},
        "simulated": False,
        "ranks": 1,
        "devices": [{"name": name, "card": "NVIDIA Test", "total": 1000 * MIB} for name in DEVICES],
        "models": [{**model, "devices": devices}],
        "records": ["memory.jsonl"],
        **more,
    }


def event(kind, text, time=2000.0, level="warning", **facts):
    """Return one line of events.jsonl."""
    return {"time": time, "level": level, "kind": kind, "text": text, **facts}


def lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def write(folder, **files):
    """Write a whole folder; `files` replace or add some, name -> text; None leaves one out."""
    content = {
        "plan.json": json.dumps(plan()),
        "run.json": json.dumps(run()),
        "memory.jsonl": lines(step(number) for number in range(1, 7)),
        **files,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    return folder
