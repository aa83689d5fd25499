"""Reads a DeepSpeed config of the user's: a JSON file or JSON text -> a dict that is one of ZeRO stage 3."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import zero_support
from .errors import SettingError

OBJECTS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")  # those that we and transformers read


def read(text: str, source: str = "BALANCE_ZERO_CONFIG") -> dict[str, Any]:
    """Return the config that `text`, a path or JSON, holds.

    Args:
        source: the name for messages.

    Raises:
        SettingError: it cannot be read, is not a JSON object, or asks for another stage than 3.
    """
    shown = source
    if not text.lstrip().startswith(("{", "[")):
        path = Path(text).expanduser()
        shown = f"{source}={os.fspath(path)}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise SettingError(f"{shown} cannot be read ({reason})") from None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise SettingError(f"{shown} is not JSON ({error})") from None
    return checked(config, shown)


def of_accelerate(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the config that `accelerate launch` or its config file has been given; empty where there is none.

    Raises:
        SettingError: it cannot be read, or is not one of stage 3.
    """
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "").strip()
    source = "the DeepSpeed config of `accelerate launch`"
    if stage.isdigit():
        checked({"zero_optimization": {"stage": int(stage)}}, source)
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "").strip()
    return read(path, source) if path and path != "none" else {}


def checked(config: Any, shown: str) -> dict[str, Any]:
    """Return `found` if it can be merged into a config of ZeRO-3.

    Raises:
        SettingError: it is no object, or asks for another stage than 3.
    """
    if not isinstance(config, dict):
        raise SettingError(f"{shown} is not a DeepSpeed config, which is a JSON object")
    for name in OBJECTS:
        if not isinstance(config.get(name, {}), dict):
            raise SettingError(f"{shown}: {name} is {config[name]!r}, not an object")
    stage = config.get("zero_optimization", {}).get("stage", 3)
    if stage not in (3, "3", "auto"):
        raise SettingError(zero_support.sentence("other_stage", source=shown, stage=stage))
    return config
