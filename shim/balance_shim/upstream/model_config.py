"""From a user's name of a model (a folder, a file, a name on the hub) to its config and its class."""

import copy
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from ..versions import dtype_name, version_text

# Where a config does not say its class: the tasks that people train for, the more particular first.
_TASKS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
)
_TRUST = "it runs code of its own, which --trust-remote-code allows"


@dataclass(frozen=True)
class ModelConfig:
    """A config, and the class that it is the config of.

    Attributes:
        note: how the class was chosen, where a user should know; mostly empty.
    """

    config: Any
    model_class: Any
    note: str = ""


def find(model: str, trust_remote_code: bool = False) -> ModelConfig:
    """Return config and class of `model`: a folder with a config.json, such a file, or a name on the hub.

    Raises:
        ModelError: there is no such model, or this transformers does not know it.
    """
    location = _place(model)
    config = _config(model, location, trust_remote_code)
    if os.path.isfile(location) and os.path.basename(location) == "config.json":
        location = os.path.dirname(os.path.abspath(location))  # where its code is, if it has any
    try:
        return _with_class(model, config, location, trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # code of a model's author, and imports that it asks for
        raise ModelError(f"{model}: its class cannot be found: {one_line(error)}") from error


def of(config: Any, trust_remote_code: bool = False) -> ModelConfig:
    """Return `config`, a `PretrainedConfig`, with its class.

    Raises:
        ModelError: this transformers has no class for it.
    """
    name = type(config).__name__
    if not hasattr(config, "model_type"):
        raise ModelError(f"{name} is not a model, config, path or hub id")
    try:
        # A copy: loading writes into a config.
        return _with_class(name, copy.deepcopy(config), getattr(config, "name_or_path", ""), trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name}: its class cannot be found: {one_line(error)}") from error


def dtype_of(config: Any) -> Any | None:
    """Return the dtype that a config names for its weights, as torch has it; None when it names none."""
    import torch

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (config, text):
        named = getattr(part, dtype_name(), None)
        dtype = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else named
        if isinstance(dtype, torch.dtype):
            return dtype
    return None


def one_line(error: BaseException) -> str:
    """Return the message of `error` in one line of reasonable length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(model: str) -> str:
    """Return where to look for `model`; only a name that can be one is looked for on the hub."""
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ModelError(f"{model}: the folder has no config.json")
        return path
    if os.path.exists(path):
        _check_config(model, path)
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith(".") or model.endswith(".json"):
        raise ModelError(
            f"{model}: no such file or folder; a folder with a config.json, such a file, or a hub id will do"
        )
    return model


def _check_config(model: str, path: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        raise ModelError(f"{model}: not JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: cannot be read: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{model}: a config is a JSON object, which this is not")
    if not content.get("model_type"):  # AutoConfig would look for a type in the path: a folder "empty" is an MPT
        raise ModelError(f"{model}: the config names no model_type")


def _config(model: str, location: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    is_local = os.path.exists(location)
    if is_local and os.path.isdir(location):
        _check_config(os.path.join(model, "config.json"), os.path.join(location, "config.json"))
    failure: Exception | None = None
    for cached_only in (True,) if is_local else (True, False):  # what is there already needs no network
        try:
            return AutoConfig.from_pretrained(
                location, trust_remote_code=trust_remote_code, local_files_only=cached_only
            )
        except OSError as error:
            failure = error
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise ModelError(f"{model}: {_TRUST}") from error
            raise ModelError(f"{model}: {_unusable(error)}") from error
    if is_local:
        raise ModelError(f"{model}: {one_line(failure or OSError())}") from failure
    unreachable = "connect" in str(failure) or "offline" in str(failure)
    then = "the hub cannot be reached" if unreachable else "the hub has no config.json for it"
    raise ModelError(f"{model}: neither a file nor a folder, nor in the cache of the hub; {then}") from failure


def _unusable(error: Exception) -> str:
    unknown = re.search(r"model type `([^`]*)`", str(error))
    if unknown:
        return f"transformers {version_text('transformers')} does not know its model type {unknown.group(1)!r}"
    return f"its config cannot be used: {one_line(error)}"


def _with_class(model: str, config: Any, location: str, trust_remote_code: bool) -> ModelConfig:
    import transformers

    named = [name for name in getattr(config, "architectures", None) or () if isinstance(name, str)]
    remote = getattr(config, "auto_map", None) or {}
    for name in named:
        reference = next(
            (value for value in remote.values() if isinstance(value, str) and value.endswith(f".{name}")), None
        )
        if reference is not None and trust_remote_code:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return ModelConfig(config, get_class_from_dynamic_module(reference, location))
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            if model_class.can_generate() or not name.endswith("Model"):
                return ModelConfig(config, model_class)
        elif model_class is not None:
            needed = ", ".join(getattr(model_class, "_backends", ())) or "packages that are not installed"
            raise ModelError(f"{model}: {name} needs {needed}")
        elif reference is not None:
            raise ModelError(f"{model}: {_TRUST}")
    guessed = _guessed_class(config)
    if guessed is not None:
        missing = f"{named[0]} has no head to train" if named and hasattr(transformers, named[0]) else ""
        missing = missing or (f"{named[0]} is not in this transformers" if named else "its config names no class")
        return ModelConfig(config, guessed, f"{missing}, assuming {guessed.__name__}")
    wanted_class = f"class {named[0]}" if named else f"a class for model type {getattr(config, 'model_type', '')!r}"
    raise ModelError(f"{model}: transformers {version_text('transformers')} has no {wanted_class}")


def _guessed_class(config: Any) -> Any | None:
    from transformers.models.auto import modeling_auto

    for task in _TASKS:
        if task == "MODEL_FOR_MASKED_LM_MAPPING" and getattr(config, "is_decoder", False):
            continue
        mapping = getattr(modeling_auto, task, {})
        if type(config) in mapping:
            classes = mapping[type(config)]
            return classes[0] if isinstance(classes, (list, tuple)) else classes
    return None


def config_text(config: Any) -> str:
    """Return all fields of a config as JSON, with the `repr` of values that are not JSON.

    Transformers' own function raises TypeError for a data type in a config inside another (4.51), and for what a script
    has put into a config.
    """
    try:
        return str(config.to_json_string(use_diff=False))
    except TypeError:
        return json.dumps(config.to_dict(), sort_keys=True, default=repr)
