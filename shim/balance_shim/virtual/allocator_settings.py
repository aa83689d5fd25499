"""Sizes and options of PyTorch's caching allocator for accelerators.

Sources: c10/cuda/CUDACachingAllocator.cpp, c10/core/AllocatorConfig.h and "CUDA semantics: memory management" in the
documentation of torch, 2.5 to 2.13; the same in all of them as far as it concerns this model.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..units import GIB, KIB, MIB

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the first one wins; torch before 2.9 knows the second
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # set to anything: every tensor is allocated by the driver alone
FULL_SIZE = 2 * GIB  # devices from here on have segments of the real sizes
SMALLEST_SCALE = 2048


@dataclass(frozen=True)
class Geometry:
    """The allocator's constants in bytes.

    Attributes:
        granule: every request is rounded up to a multiple of this.
        small: the largest request of the small pool.
        small_segment: bytes that the small pool takes from the device at a time.
        large_segment: bytes that the large pool takes for requests below `direct`.
        direct: requests from here on get a segment of their own size.
        rounding: of which that size is a multiple.
    """

    granule: int = 512
    small: int = MIB
    small_segment: int = 2 * MIB
    large_segment: int = 20 * MIB
    direct: int = 10 * MIB
    rounding: int = 2 * MIB

    def segment(self, size: int) -> int:
        """Return the bytes to take from the device for a request of `size` bytes that no cached block serves."""
        if size <= self.small:
            return self.small_segment
        if size < self.direct:
            return self.large_segment
        return -(-size // self.rounding) * self.rounding


CUDA = Geometry()


def geometry_for(capacity: int) -> Geometry:
    """Return CUDA's geometry, scaled down for simulated devices that are smaller than any real one.

    On a device of a few MiB, as tests have, one 20 MiB segment would be more than the device. All sizes but the granule
    shrink by one power of two, so that segments are at most the part of the device that they are on one of 2 GiB.
    """
    scale = 1
    while capacity * scale < FULL_SIZE and scale < SMALLEST_SCALE:
        scale *= 2
    if scale == 1:
        return CUDA
    return Geometry(
        small=CUDA.small // scale,
        small_segment=CUDA.small_segment // scale,
        large_segment=CUDA.large_segment // scale,
        direct=CUDA.direct // scale,
        rounding=CUDA.rounding // scale,
    )


@dataclass(frozen=True)
class AllocatorSettings:
    """The figures that `PYTORCH_CUDA_ALLOC_CONF` can change.

    Attributes:
        expandable_segments: whether a pool is one range of addresses that grows.
        max_split_size: blocks from this size on are not split, and serve only requests of that size; None: no limit.
        max_non_split_rounding: by how much such a block may exceed the request.
        roundup_power2_divisions: (upper bound of the request in bytes, divisions between two powers of two) in
            ascending order; the last pair holds for everything above. Empty: no such rounding.
        garbage_collection_threshold: of the memory that the process may use; 0: off. As in torch, it has an effect only
            once a memory fraction is set.
        memory_fraction: of the device that the process may use; None: all of it.
        caches: whether freed memory stays with the process (`PYTORCH_NO_CUDA_MEMORY_CACHING`).
    """

    expandable_segments: bool = False
    max_split_size: int | None = None
    max_non_split_rounding: int = 20 * MIB
    roundup_power2_divisions: tuple[tuple[int, int], ...] = ()
    garbage_collection_threshold: float = 0.0
    memory_fraction: float | None = None
    caches: bool = True

    def divisions(self, size: int) -> int:
        """Return the divisions for a request of `size` bytes; 0 or 1: only the granule counts."""
        rest = 0
        for bound, divisions in self.roundup_power2_divisions:
            if size < bound:
                return divisions
            rest = divisions
        return rest


DEFAULT = AllocatorSettings()


def read(environ: Mapping[str, str] = os.environ) -> AllocatorSettings:
    """Return the settings in `environ`. Keys that change no figure, and values that torch would refuse, are ignored."""
    text = next((environ[name] for name in VARIABLES if environ.get(name, "").strip()), "")
    pairs = _pairs(text)
    settings: dict[str, object] = {}
    if "expandable_segments" in pairs:
        settings["expandable_segments"] = pairs["expandable_segments"].lower() == "true"
    for key, field in (
        ("max_split_size_mb", "max_split_size"),
        ("max_non_split_rounding_mb", "max_non_split_rounding"),
    ):
        if pairs.get(key, "").isdigit():
            settings[field] = int(pairs[key]) * MIB
    if "roundup_power2_divisions" in pairs:
        settings["roundup_power2_divisions"] = _divisions(pairs["roundup_power2_divisions"])
    threshold = _fraction(pairs.get("garbage_collection_threshold", ""))
    if threshold is not None:
        settings["garbage_collection_threshold"] = threshold
    settings["memory_fraction"] = _fraction(pairs.get("per_process_memory_fraction", ""))
    settings["caches"] = UNCACHED not in environ
    return AllocatorSettings(**settings)  # type: ignore[arg-type]


def is_set(environ: Mapping[str, str]) -> bool:
    """Whether the user has configured the allocator in any way."""
    return any(environ.get(name, "").strip() for name in VARIABLES)


def _pairs(text: str) -> dict[str, str]:
    """Return key -> value of "key:value,key:[a:b,c:d]"."""
    pairs: dict[str, str] = {}
    part, depth = "", 0
    for letter in f"{text},":
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth <= 0:
            key, _, value = part.partition(":")
            pairs[key.strip()] = value.strip()
            part = ""
        else:
            part += letter
    return pairs


def _divisions(text: str) -> tuple[tuple[int, int], ...]:
    """Read "4", or "[256:1,512:2,>:8]" with bounds in MiB."""
    if text.isdigit():
        return ((0, int(text)),)
    bounds: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    for part in text.strip("[]").split(","):
        bound, _, divisions = part.partition(":")
        if not divisions.strip().isdigit():
            continue
        if bound.strip() == ">":
            rest = [(0, int(divisions))]
        elif bound.strip().isdigit():
            # Sizes up to a power of two above the bound count as it in torch: it looks at the highest bit.
            bounds.append((int(bound) * KIB * KIB * 2, int(divisions)))
    return (*sorted(bounds), *rest)


def _fraction(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value <= 1 else None
