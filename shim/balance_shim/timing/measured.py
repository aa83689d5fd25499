"""Rates that `balance-shim doctor --measure` has measured on this machine; they win over the table of kinds.

They are in a file of the cache folder, by the name that the driver gives a device. They hold for all devices of that
name, those that are only planned for included.
"""

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..device_rules.kinds import DeviceKind
from .rates import DeviceRates, HostRates, rates_of

FILE = "measured.json"


@dataclass(frozen=True)
class Measured:
    """The measured rates of one product; 0 for those that could not be measured.

    Attributes:
        float16, bfloat16, float32: FLOP/s of a large matrix product.
        memory: bytes/s read and written by a copy within the device.
        link_bytes: bytes/s between two devices of the machine, for the slowest pair.
        host_bytes: bytes/s between host and device.
        launch: seconds that the host takes for one kernel.
    """

    float16: float = 0.0
    bfloat16: float = 0.0
    float32: float = 0.0
    memory: float = 0.0
    link_bytes: float = 0.0
    host_bytes: float = 0.0
    launch: float = 0.0


def rates_for(product: str, kind: DeviceKind | None, folder: Path | None) -> DeviceRates | None:
    """Return the rates of a device: those measured, else those of the table; None where there are neither.

    Args:
        product: as the driver names it.
        folder: of the cache; None: there is none.
    """
    nominal = rates_of(kind)
    measured = read(folder).get(product)
    if measured is None:
        return nominal
    values = {name: value for name, value in asdict(measured).items() if value}
    if not values:
        return nominal
    if nominal is not None:
        return replace(nominal, measured=True, **values)
    needed = ("float16", "bfloat16", "float32", "memory")
    if any(not values.get(name) for name in needed):
        return None
    link = values.get("link_bytes", values.get("host_bytes", 0.0))
    host = values.get("host_bytes", link)
    if not link:
        return None
    half, brain, single, memory = (values[name] for name in needed)
    return DeviceRates(half, brain, single, memory, "pcie", link, host, measured=True, launch=measured.launch)


def host_of(rates: "list[DeviceRates]") -> HostRates:
    """Return the host's rates: its measured cost of a launch, if there is one, and the others in proportion."""
    launch = max((device_rates.launch for device_rates in rates), default=0.0)
    nominal = HostRates()
    if not launch:
        return nominal
    return replace(nominal, launch=launch, view=nominal.view * launch / nominal.launch, measured=True)


def read(folder: Path | None) -> dict[str, Measured]:
    """Return product -> measured rates; empty where there are none, or the file cannot be read."""
    if folder is None:
        return {}
    path = folder / FILE
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return {}
    return _read(path, changed)


@lru_cache(maxsize=4)
def _read(path: Path, _: int) -> dict[str, Measured]:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return {product: _usable(rates) for product, rates in content.items() if isinstance(rates, dict)}
    return {}


def _usable(rates: dict[str, Any]) -> Measured:
    """Return those of the stored rates that are rates: the file may be damaged, edited, or of another version."""
    names = {field.name for field in fields(Measured)}
    return Measured(
        **{
            name: float(rate)
            for name, rate in rates.items()
            if name in names and type(rate) in (int, float) and 0 < rate < math.inf
        }
    )


def write(folder: Path, measured: dict[str, Measured]) -> Path:
    """Store the measured rates, along with earlier ones of other products; return the file.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {product: asdict(rates) for product, rates in {**read(folder), **measured}.items()}
    path = folder / FILE
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(part, path)
    return path
