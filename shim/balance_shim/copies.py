"""Copies between devices, checked: on some machines they arrive corrupted, without an error.

Boards whose driver offers peer access that does not work (RTX 4090 with some drivers, ACS or an IOMMU between the
slots) copy zeros or garbage from one device to the other, while the way over host memory is right
(NVIDIA/nccl-tests#117). Everything computed across such devices is wrong, whoever made the map.
"""

from typing import TYPE_CHECKING, Any

from . import log
from .units import KIB, MIB

if TYPE_CHECKING:
    import torch

PATTERN = MIB
SMALL_PATTERN = 64 * KIB  # on a device with little free memory, ...
PLENTY = 64 * MIB  # ... which is less than this
REMEDY = (
    "disable ACS and the IOMMU (BIOS, or iommu=pt on the kernel's command line), or peer access in the driver; "
    "NCCL_P2P_DISABLE=1 does not help"
)

_checked: "dict[tuple[torch.device, torch.device], bool]" = {}
_patterns = 0


def moved(tensor: Any, target: "torch.device") -> Any:
    """Return `tensor` on `target`, over host memory where direct copies between the two devices arrive corrupted."""
    source = tensor.device
    if "cpu" in (source.type, target.type) or source == target or arrive_unchanged(source, target):
        return direct(tensor, target)
    return direct(direct(tensor, _host()), target)


def arrive_unchanged(source: "torch.device", target: "torch.device") -> bool:
    """Whether copies from `source` to `target` arrive intact; checked once per process and pair.

    Where the pattern cannot be copied at all (a full device), nothing is known, and the copy to come decides.
    """
    pair = source, target
    if pair not in _checked:
        try:
            _checked[pair] = pattern_arrives(source, target)
        except Exception:
            return True
        if not _checked[pair]:
            log.warning(
                f"copies from {source} to {target} arrive corrupted, so blocks move through host memory; results "
                f"computed across these devices are wrong under any map: {REMEDY}"
            )
    return _checked[pair]


def pattern_arrives(source: "torch.device", target: "torch.device") -> bool:
    """Copy a pattern from `source` to `target`, and return whether it arrives intact.

    Raises:
        RuntimeError: it cannot be copied.
    """
    import torch

    global _patterns
    _patterns += 1  # another one each time: memory that is handed out again may still hold the last
    size = PATTERN if min(_free(source), _free(target)) >= PLENTY else SMALL_PATTERN
    pattern = torch.arange(size // 8, dtype=torch.int64) * (2 * _patterns + 1) + 1
    with torch.no_grad():
        arrived = direct(direct(pattern, source), target)
    return bool(torch.equal(direct(arrived, _host()), pattern))


def direct(tensor: Any, target: "torch.device") -> Any:
    """Return `tensor` on `target` by torch's own copy, whichever way that takes."""
    return tensor.to(target)


def _free(device: "torch.device") -> int:
    import torch

    return int(torch.get_device_module(device).mem_get_info(device.index)[0])


def _host() -> "torch.device":
    import torch

    return torch.device("cpu")
