"""ms-swift's command line as its users type it, and where it leaves its losses and checkpoints."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.end_to_end.run import read_losses


def executable() -> str:
    """The `swift` command of this interpreter's environment."""
    path = shutil.which("swift", path=str(Path(sys.executable).parent))
    if path is None:
        raise RuntimeError(f"ms-swift is not installed beside {sys.executable}: run this in the swift lane")
    return path


def sft_arguments(
    model: Path, dataset: Path, output: Path, tuning: str, steps: int = 3, device_map: Path | str | None = None
) -> list[str]:
    """What follows `swift`: fine-tuning of `model` on a chat file, `tuning` "lora" or "full", without a network.

    The model's type and template are given because ms-swift otherwise looks them up by the model's name on a hub.
    """
    options = {
        "model": model,
        "model_type": "llama",
        "template": "chatml",
        "check_model": "false",  # asks the hub whether the folder is the newest version
        "use_hf": "true",
        "dataset": dataset,
        "split_dataset_ratio": 0,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "max_length": 128,
        "truncation_strategy": "right",
        "tuner_type": tuning,
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": "1e-4",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": steps,
        "eval_strategy": "no",
        "report_to": "none",
        "seed": 42,
        "output_dir": output,
        "add_version": "false",  # otherwise the results lie in a folder named by the time of day
    }
    if device_map is not None:
        options["device_map"] = device_map
    return ["sft", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


def losses(output: Path) -> list[float]:
    """The loss of each logged step of the run that wrote to `output`."""
    return read_losses(output / "logging.jsonl")


def checkpoints(output: Path) -> list[str]:
    """The names of the weight files in the checkpoints that the run saved, such as "checkpoint-3/model.safetensors"."""
    return sorted(str(file.relative_to(output)) for file in output.glob("checkpoint-*/*.safetensors"))
