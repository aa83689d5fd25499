"""Sizes in bytes: parsing and formatting."""

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4

# Both families are accepted because both are in use; a bare K, M, G or T is binary, as `free` and `nvidia-smi` show.
_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "m": MIB, "g": GIB, "t": TIB,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip

_UNITS = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))

SIZE_FORMS = "a size such as 20GiB, 512MiB or 8e9"


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` ("20GiB", "1.5 GB", "8e9") stands for.

    Raises:
        ValueError: `text` is not a number with an optional unit, or is not a positive finite amount.
    """
    digits = text.strip().lower().rstrip("bgikmt ")
    unit = text.strip().lower()[len(digits) :].strip()
    if unit not in _FACTORS:
        raise ValueError(f"{text!r} is not {SIZE_FORMS}")
    try:
        size = float(digits) * _FACTORS[unit]
    except ValueError:
        raise ValueError(f"{text!r} is not {SIZE_FORMS}") from None
    if not 1 <= size < 2**63:  # also refuses nan and inf
        raise ValueError(f"{text!r} is not a positive size below 8 EiB")
    return int(size)


def format_size(size: float) -> str:
    """Return `size` bytes in the largest binary unit that keeps it at or above one: 25769803776 -> "24.0 GiB"."""
    sign, size = ("-", -size) if size < 0 else ("", size)
    for unit, name in _UNITS:
        if size >= unit:
            return f"{sign}{size / unit:.1f} {name}"
    return f"{sign}{size:.0f} B"


def format_alike(*sizes: float) -> tuple[str, ...]:
    """Return sizes that are to be compared in one unit, that of the largest: ("0.879 GiB", "24.000 GiB").

    With as many decimals as the smallest needs for two digits, three at most.
    """
    largest = max((abs(size) for size in sizes), default=0)
    unit, name = next(((unit, name) for unit, name in _UNITS if largest >= unit), (1, "B"))
    smallest = min((abs(size) / unit for size in sizes if size), default=1.0)
    decimals = 0 if unit == 1 else 1 if smallest >= 1 else 2 if smallest >= 0.1 else 3
    return tuple(f"{size / unit:.{decimals}f} {name}" for size in sizes)


def counted(number: int, noun: str) -> str:
    """Return "1 block", "2 blocks" or "2 processes"."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s")


def gib(size: float, largest: float) -> str:
    """Return `size` bytes as a bare number of GiB for a table whose largest figure is `largest`: three digits show."""
    return f"{size / GIB:.{1 if largest >= 10 * GIB else 2 if largest >= GIB else 3}f}"
