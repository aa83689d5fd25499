"""What ZeRO-3 needs to be installed, said in one line before any process is started for it."""

from ..errors import BalanceError
from ..versions import numbers, version_text

OLDEST = {"deepspeed": "0.16.0", "accelerate": "1.0.0"}


def check() -> None:
    """Raise where a library that ZeRO-3 needs is missing or too old.

    Raises:
        BalanceError: what to install.
    """
    for library, oldest in OLDEST.items():
        found = version_text(library)
        remedy = f"(pip install -U '{library}>={oldest}')"
        if not found:
            raise BalanceError(f"BALANCE_MODE=zero3 needs {library}, which is not installed {remedy}")
        if numbers(found) < numbers(oldest):
            raise BalanceError(f"BALANCE_MODE=zero3 needs {library} {oldest} or newer; {found} is installed {remedy}")
