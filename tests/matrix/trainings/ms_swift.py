"""ms-swift through its own command, `swift sft` or `swift rlhf`, as its users type it."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from common import MODELS, NAME, OUTPUT, ROWS, words, write

OUTPUT.mkdir(parents=True, exist_ok=True)
rows = []
for row in range(32):
    turns = [{"role": "user", "content": words(row, 8)}, {"role": "assistant", "content": words(row + 1, 10)}]
    rows.append({"messages": turns} | ({"rejected_response": words(row + 2, 6)} if NAME == "dpo" else {}))
data = OUTPUT / "chat.jsonl"
data.write_text("\n".join(map(json.dumps, rows)))
first = int(version("ms-swift").split(".")[0])
options = {
    "model": MODELS / "llama", "model_type": "llama" if first >= 4 else "llama3", "template": "chatml",
    "check_model": "false", "use_hf": "true", "dataset": data, "split_dataset_ratio": 0, "dataset_num_proc": 1,
    "dataloader_num_workers": 0, "max_length": 64, "torch_dtype": "float32", "attn_impl": "sdpa", "max_steps": 3,
    "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "learning_rate": "1e-3", "logging_steps": 1,
    "save_strategy": "steps", "save_steps": 3, "eval_strategy": "no", "report_to": "none", "seed": 42,
    "output_dir": OUTPUT / "trained", "add_version": "false", "lora_dropout": 0, "fp16": "false", "bf16": "false",
    "tuner_type" if first >= 4 else "train_type": "full" if NAME == "full" else "lora",
}  # fmt: skip
if NAME == "dpo":
    options["rlhf_type"] = "dpo"
command = [str(Path(sys.executable).parent / "swift"), "rlhf" if NAME == "dpo" else "sft"]
command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
done = subprocess.run(command)
if done.returncode:
    sys.exit(done.returncode)
logged = (OUTPUT / "trained" / "logging.jsonl").read_text().splitlines()
losses = [entry["loss"] for entry in map(json.loads, logged) if "loss" in entry]
(OUTPUT / "saved").symlink_to(OUTPUT / "trained" / "checkpoint-3", target_is_directory=True)
write(losses, kind="CausalLM" if NAME == "full" else "PEFT", base="llama")
