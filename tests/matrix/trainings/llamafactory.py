"""LLaMA-Factory through its own command, `llamafactory-cli train`."""

import json
import subprocess
import sys
from pathlib import Path

from common import MODELS, NAME, OUTPUT, ROWS, words, write

OUTPUT.mkdir(parents=True, exist_ok=True)
data = [{"instruction": words(row, 8), "input": "", "output": words(row + 1, 10)} for row in range(32)]
(OUTPUT / "own.json").write_text(json.dumps(data))
(OUTPUT / "dataset_info.json").write_text(json.dumps({"own": {"file_name": "own.json"}}))
settings = {
    "model_name_or_path": str(MODELS / "llama"), "stage": "sft", "do_train": True, "finetuning_type": NAME,
    "dataset": "own", "dataset_dir": str(OUTPUT), "template": "empty", "cutoff_len": 64,
    "output_dir": str(OUTPUT / "saved"),
    "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "max_steps": 3,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "fp16": False, "lora_dropout": 0.0,
    "lora_target": "q_proj,v_proj", "disable_gradient_checkpointing": True, "overwrite_cache": True, "seed": 1,
    "flash_attn": "sdpa",
}  # fmt: skip
if NAME == "full":
    del settings["lora_target"], settings["lora_dropout"]
file = OUTPUT / "train.json"
file.write_text(json.dumps(settings))  # JSON is YAML
yaml = file.rename(OUTPUT / "train.yaml")
done = subprocess.run([str(Path(sys.executable).parent / "llamafactory-cli"), "train", str(yaml)])
if done.returncode:
    sys.exit(done.returncode)
state = json.loads((OUTPUT / "saved" / "trainer_state.json").read_text())
losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
write(losses, kind="CausalLM" if NAME == "full" else "PEFT", base="llama")
