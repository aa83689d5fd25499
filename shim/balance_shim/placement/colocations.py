"""Blocks that training has shown to need one device: remembered for the next load of the same model, here and on disk.

A dry run does not see all that a script computes. What a real step has shown is kept under a key of the model as it is
before its weights load, and is part of every later plan of it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .. import cache
from ..memory.colocation import NO_CONSTRAINTS, Constraints

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Colocations:
    """The constraints that failed steps have shown for a model.

    Attributes:
        constraints: the blocks that must share a device.
        library_map: whether no map of ours ran, and the library's own did.
    """

    constraints: Constraints = field(default=NO_CONSTRAINTS)
    library_map: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"constraints": self.constraints.to_json(), "library_map": self.library_map}

    @classmethod
    def from_json(cls, content: Any) -> "Colocations":
        """Return the object that `to_json` was called on."""
        return cls(Constraints.from_json(content["constraints"]), bool(content["library_map"]))


NONE = Colocations()
_keys: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
_by_key: dict[str, Colocations] = {}


def recall(model: "nn.Module", folder: Path | None) -> Colocations:
    """Return the colocations of `model`, which is about to load; `of` and `remember` accept it from now on.

    Args:
        folder: of the disk cache; None for none.
    """
    key = _keys[model] = cache.digest("colocations", _identity(model))
    if key not in _by_key:
        stored = cache.stored(folder, key)
        if stored is not None:
            _by_key[key] = Colocations.from_json(stored)
    return of(model)


def of(model: "nn.Module") -> Colocations:
    """Return the colocations of a model that `recall` was called for."""
    return _by_key.get(_keys.get(model, ""), NONE)


def remember(model: "nn.Module", colocations: Colocations, folder: Path | None) -> None:
    """Store the colocations of `model`, which `recall` was called for."""
    key = _keys.get(model)
    if key is not None:
        _by_key[key] = colocations
        cache.store(folder, key, colocations.to_json())


def forget() -> None:
    """Forget everything stored in this process; the disk cache stays."""
    _by_key.clear()


def _identity(model: "nn.Module") -> list[Any]:
    from ..memory.fingerprint import PACKAGES
    from ..upstream.model_config import config_text
    from ..versions import version_text

    config: Any = getattr(model, "config", None)
    described = json.loads(config_text(config)) if hasattr(config, "to_json_string") else {}
    described.pop("_name_or_path", None)  # the same model from another folder
    shapes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    return [
        [version_text(package) for package in PACKAGES],
        f"{type(model).__module__}.{type(model).__qualname__}",
        described,
        shapes,
    ]
