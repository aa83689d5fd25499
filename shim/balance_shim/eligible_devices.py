"""Selection of the accelerators that a map may use, without creating a context on any of them.

Asking a device how much memory is free makes a context on it, of 0.3 to 0.5 GiB on CUDA. Its name, its total memory
and its architecture come from the driver without one.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from . import log
from .settings import Settings
from .units import format_size

DISPLAY_CARD = 0.1  # of the largest device's memory: a device with less is there for a screen


def eligible(
    module: Any, kind: str, settings: Settings, caps: Mapping[int, int], script_caps: Mapping[int, int]
) -> tuple[int, ...]:
    """Return the indices of the devices that may be asked for their memory and used, in order.

    Left out are devices that the script or the user excludes and, with a line, those for which this torch has no
    kernels, unless one of the two names them.

    Args:
        module: torch's module of this kind of device, `torch.cuda`.
        kind: its name, "cuda".
        caps: of `BALANCE_MAX_MEMORY`, device -> bytes; 0 excludes a device.
        script_caps: of the script's `max_memory`; if there are any, devices that it leaves out are excluded.
    """
    admitted = []
    for index in range(module.device_count()):
        if script_caps and index not in script_caps and index not in caps:
            continue
        if caps.get(index, script_caps.get(index)) != 0:
            admitted.append(index)
    named = {*caps, *script_caps}
    usable = [index for index in admitted if index in named or has_kernels(module, index)]
    if not usable:  # then the list of architectures is not to be trusted
        return tuple(admitted)
    for index in sorted(set(admitted) - set(usable)):
        log.once(
            "warning",
            f"{kind}:{index} ({name_of(module, index)}) is not used: this torch has no kernels for its architecture; "
            f"BALANCE_MAX_MEMORY={index}=SIZE uses it anyway",
        )
    return tuple(usable)


def has_kernels(module: Any, index: int) -> bool:
    """Whether this torch was built for the architecture of a device; True where that cannot be told.

    CUDA binaries run on devices of the same major version, and from their minor version on; PTX ("compute_") on all
    later ones. ROCm's names have to be the same, up to the features behind the colon.
    """
    try:
        built = list(module.get_arch_list())
        properties = module.get_device_properties(index)
    except Exception:  # npu and xpu have no such list, and old ones no properties
        return True
    if not built:
        return True
    name = str(getattr(properties, "gcnArchName", "")).partition(":")[0]
    if any(architecture.startswith("gfx") for architecture in built):
        return not name or any(_is_built_for_gfx(architecture, name) for architecture in built)
    major, minor = int(properties.major), int(properties.minor)
    versions = [
        (form, *_version(digits)) for form, _, digits in (architecture.partition("_") for architecture in built)
    ]
    return any(
        (form == "sm" and compiled_major == major and least <= minor)
        or (form == "compute" and (compiled_major, least) <= (major, minor))
        for form, compiled_major, least in versions
    )


def display_cards(module: Any, indices: Sequence[int], named: Collection[int] = ()) -> frozenset[int]:
    """Return the devices of `indices` that have less than a tenth of the memory of the largest, and are not `named`.

    Never device 0: the Trainer puts inputs there and has outputs return to it, whatever the map, so that it is planned
    for.
    """
    totals = {index: total for index in indices if (total := total_memory(module, index)) is not None}
    largest = max(totals.values(), default=0)
    return frozenset(
        index for index, total in totals.items() if total < DISPLAY_CARD * largest and index not in (0, *named)
    )


def describe_display_cards(module: Any, kind: str, indices: Collection[int]) -> str:
    """Return "cuda:2 (NVIDIA T400, 4.0 GiB)" for each device."""
    return ", ".join(
        f"{kind}:{index} ({name_of(module, index)}, {format_size(total_memory(module, index) or 0)})"
        for index in sorted(indices)
    )


def name_of(module: Any, index: int) -> str:
    """Return a device's name as its driver has it, or "unknown"."""
    try:
        return str(module.get_device_properties(index).name)
    except Exception:
        return "unknown"


def total_memory(module: Any, index: int) -> int | None:
    """Return the bytes of a device, free or not; None where torch cannot tell."""
    try:
        return int(module.get_device_properties(index).total_memory)
    except Exception:
        return None


def _version(digits: str) -> tuple[int, int]:
    """Return (9, 0) for "90", "90a" and "90f", (12, 0) for "120"."""
    number = int("".join(filter(str.isdigit, digits)) or 0)
    return number // 10, number % 10


def _is_built_for_gfx(built: str, name: str) -> bool:
    stem, generic, _ = built.partition("-generic")
    return name.startswith(stem.replace("-", "")) if generic else built.partition(":")[0] == name
