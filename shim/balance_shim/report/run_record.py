"""`run.json` in the report folder: machine, versions, settings, models and records of the latest run.

Written by the first process as soon as there is something to record, and again with each addition. It has no command
line and no environment but `BALANCE_*`, so it holds no secrets of the program's.
"""

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__, devices, log, state
from ..eligible_devices import name_of, total_memory
from ..memory.workload import from_arguments
from ..placement.request import Request
from ..upstream.model_config import config_text
from ..upstream.trainer import TrainingArgumentsLike
from ..versions import version_text
from . import events

FILE = "run.json"
FORMAT = 1
# As they are called on PyPI.
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "ms_swift", "llamafactory", "deepspeed")
_runs: dict[str, dict[str, Any]] = {}


def add_model(folder: str, number: int, request: Request) -> None:
    """Record the model that was planned for `request`, so that it can be planned again from the folder alone.

    Args:
        folder: the report folder.
        number: of the plan's files.
    """
    model = request.model
    # A model of a script's own may have no config; it cannot be planned again.
    config: dict[str, Any] = json.loads(config_text(model.config)) if hasattr(model, "config") else {}
    source = home_as_tilde(str(config.pop("_name_or_path", "") or ""))
    if config:
        config["architectures"] = [type(model).__name__]
    entry = {
        "number": number,
        "class": type(model).__name__,
        "source": source,
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "config": config,
        "devices": [asdict(device) for device in request.devices],
    }
    run = _run(folder)
    run["models"] = [model_entry for model_entry in run["models"] if model_entry["number"] != number] + [entry]
    _write(folder, run)


def add_training(folder: str, model: Any, arguments: TrainingArgumentsLike) -> None:
    """Record that a training begins, in any mode: the number of its processes, and its workload.

    Args:
        folder: the report folder.
        model: the innermost one that the Trainer trains.
        arguments: the Trainer's.
    """
    run = _run(folder)
    run["model"] = type(model).__name__
    run["ranks"] = int(getattr(arguments, "world_size", 1))
    run["workload"] = from_arguments(arguments)
    run["on_accelerator"] = devices.accelerator_type() is not None
    _write(folder, run)


def add_record(folder: str, record: str, indices: Sequence[int]) -> None:
    """Record a monitored training: the file of its steps, and the devices that it uses.

    Args:
        folder: the report folder.
        record: path of the file.
        indices: of the devices, in this process.
    """
    run = _run(folder)
    run["records"].append(os.path.basename(record))
    run["devices"] = _cards(indices) or run["devices"]
    _write(folder, run)


def home_as_tilde(text: str) -> str:
    """Return `text` with the home folder, which has the user's name, as "~"."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _run(folder: str) -> dict[str, Any]:
    return _runs.setdefault(os.path.abspath(folder), _new())


def _new() -> dict[str, Any]:
    settings, arming = state.settings(), state.arming()
    return {
        "format": FORMAT,
        "balance_shim": __version__,
        "started": round(events.began(), 3),
        "program": os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else "",
        "mode": settings.mode,
        "settings": {name: home_as_tilde(text) for name, text in _settings(arming)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "host_memory": _host_memory(),
        "libraries": {name: version for name in LIBRARIES if (version := version_text(name))},
        "runtime": _runtime(),
        "simulated": settings.simulate is not None,
        "model": "",
        "ranks": 1,
        "workload": {},
        "devices": _cards(None),
        "models": [],
        "records": [],
    }


def _settings(arming: state.Arming | None) -> Iterable[tuple[str, str]]:
    """Return the variables of the user's, without those that the shim sets for its own processes."""
    environ = arming.environ if arming is not None else {}
    return ((name, text) for name, text in environ.items() if not name.startswith("BALANCE_SHIM_"))


def _runtime() -> str:
    """Return the version of CUDA or ROCm that torch was built for; "" for none."""
    import torch

    version: Any = torch.version
    named = {"CUDA": getattr(version, "cuda", None), "ROCm": getattr(version, "hip", None)}
    return next((f"{name} {number}" for name, number in named.items() if number), "")


def _host_memory() -> int | None:
    """Return the bytes of the host's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _cards(indices: Sequence[int] | None) -> list[dict[str, Any]]:
    """Return name, product, total memory and capability of each device, of all where `indices` is None.

    From the driver, without a context on any.
    """
    kind = devices.accelerator_type()
    if kind is None:
        return []
    import torch

    module = torch.get_device_module(kind)
    cards = []
    for index in range(module.device_count()) if indices is None else indices:
        simulated = state.settings().simulate
        # Of a simulated device of no kind there is nothing to tell but its size.
        has_name = simulated is None or (index < len(simulated.capacities) and simulated.kind(index) is not None)
        card: dict[str, Any] = {"name": f"{kind}:{index}", "card": name_of(module, index) if has_name else ""}
        card["total"] = total_memory(module, index)
        with suppress(Exception):
            card["capability"] = list(module.get_device_capability(index))
        cards.append(card)
    return cards


def _write(folder: str, run: dict[str, Any]) -> None:
    """Write `run` under another name first, so that a reader never sees half of it."""
    path = Path(folder) / FILE
    part = path.with_name(f"{FILE}.{os.getpid()}.part")
    try:
        os.makedirs(folder, exist_ok=True)
        part.write_text(json.dumps(run, indent=1, default=str), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        log.once("warning", f"{path}: cannot be written ({error.strerror}); the report has no machine and no versions")
