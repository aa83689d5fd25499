"""Record the seams of transformers, version by version, in `seams.json`: what the shim relies on, as source has it.

    python tests/contracts/record.py 4.45.2 5.23.0     # downloads these wheels and records them
    python tests/contracts/record.py                   # every version that is recorded already, afresh

Nothing is installed or imported; the wheels are read.
"""

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("seams.json")

# file -> the classes and functions whose parameters are recorded
SEAMS = {
    "modeling_utils.py": [
        "_get_device_map",
        "PreTrainedModel.from_pretrained",
        "PreTrainedModel._get_no_split_modules",
    ],
    "integrations/accelerate.py": ["_get_device_map"],
    "training_args.py": ["TrainingArguments.__post_init__"],
    "trainer.py": [
        "Trainer.__init__",
        "Trainer.train",
        "Trainer.training_step",
        "Trainer.get_batch_samples",
        "Trainer._get_num_items_in_batch",
        "Trainer.save_model",
    ],
    "loss/loss_utils.py": ["fixed_cross_entropy"],
    "integrations/deepspeed.py": [
        "HfTrainerDeepSpeedConfig.trainer_config_process",
        "HfTrainerDeepSpeedConfig.trainer_config_finalize",
        "deepspeed_load_checkpoint",
    ],
    "quantizers/base.py": [
        "HfQuantizer.param_element_size",
        "HfQuantizer.adjust_target_dtype",
        "HfQuantizer.get_special_dtypes_update",
        "HfQuantizer.validate_environment",
    ],
}
# file -> name of the fact -> text whose presence in the file's source is the fact
TEXTS = {
    "modeling_utils.py": {
        "calls _get_device_map": "= _get_device_map(",
        "calls infer_auto_device_map": "= infer_auto_device_map(",
        "traps auto into tensor parallelism": 'device_map == "auto" and tp_plan is None and int(',
        "announces ties": "all_tied_weights_keys",
    },
    "loss/loss_utils.py": {
        "moves the token count to the loss": "num_items_in_batch = num_items_in_batch.to(loss.device)",
    },
    "trainer.py": {
        "says is_model_parallel": "self.is_model_parallel = ",
        "refuses losses on other devices": "Calculated loss must be on the original device",
        "loads DeepSpeed checkpoints by name": "    deepspeed_load_checkpoint(",
        "looks for the best checkpoint": "if os.path.exists(best_checkpoint_dir)",
        "waits before it looks": "before we check if the best_checkpoint_dir exists",
    },
    "training_args.py": {
        "asks for bf16 by name": "is_torch_bf16_gpu_available()",
        "makes the DeepSpeed config from self.deepspeed": "HfTrainerDeepSpeedConfig(self.deepspeed)",
    },
    "integrations/deepspeed.py": {
        "keeps a weak reference to the config": "_hf_deepspeed_config_weak_ref = weakref.ref(",
    },
}


def seams_of(read: Callable[[str], str | None]) -> dict[str, Any]:
    """Return the seams in a transformers source tree; `read` gives a file's text by its path below `transformers/`."""
    seams: dict[str, Any] = {}
    for file, names in SEAMS.items():
        source = read(file)
        functions = {} if source is None else _functions(ast.parse(source))
        for name in names:
            seams[f"{file}:{name}"] = functions.get(name)
    for file, texts in TEXTS.items():
        source = read(file) or ""
        for name, text in texts.items():
            seams[f"{file}: {name}"] = text in source
    return seams


def installed() -> dict[str, Any]:
    """Return the seams of the transformers that this interpreter would import."""
    import importlib.util

    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent

    def read(file: str) -> str | None:
        path = folder / file
        return path.read_text(encoding="utf-8") if path.exists() else None

    return seams_of(read)


def _functions(tree: ast.Module) -> dict[str, list[str]]:
    """Return the parameter names of each function and method by its qualified name."""
    functions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = _parameters(node)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    functions[f"{node.name}.{member.name}"] = _parameters(member)
    return functions


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else ["*"] if arguments.kwonlyargs else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def _from_wheel(version: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"transformers=={version}", "-d", folder]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = set(wheel.namelist())

            def read(file: str) -> str | None:
                path = f"transformers/{file}"
                return wheel.read(path).decode() if path in names else None

            return seams_of(read)


def main(versions: list[str]) -> None:
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for version in versions or list(recorded):
        print(version, file=sys.stderr)
        recorded[version] = _from_wheel(version)
    ordered = dict(sorted(recorded.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
    RECORD.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
