"""Versions of other packages, compared as numbers: never by probing for attributes."""

from functools import lru_cache


@lru_cache
def version_of(package: str) -> tuple[int, ...]:
    """Return the installed version as numbers, (5, 23, 0); () when the package is not installed.

    Development and release-candidate versions count as the release they lead to.
    """
    return numbers(version_text(package))


@lru_cache
def version_text(package: str) -> str:
    """Return the installed version as its package writes it; "" when it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def dtype_name() -> str:
    """Return transformers' name for the dtype of weights, as an argument and in configs; the old name warns since."""
    return "dtype" if version_of("transformers") >= (4, 56) else "torch_dtype"


def numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "4.45.0.dev0" -> (4, 45, 0), "2.13.0+cpu" -> (2, 13, 0)."""
    result = []
    for part in text.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        result.append(int(digits))
        if digits != part:
            break
    return tuple(result)
