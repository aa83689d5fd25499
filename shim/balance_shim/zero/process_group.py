"""The process group of the ranks: how long they wait for each other, and the store that they share."""

from typing import Any

DEFAULT_TIMEOUT = 1800.0  # seconds, as `TrainingArguments.ddp_timeout`; torch's own for NCCL is 600
_timeout = DEFAULT_TIMEOUT


def timeout() -> float:
    """Return the seconds that ranks wait for each other."""
    return _timeout


def remember_timeout(seconds: float) -> None:
    """Keep the seconds that ranks wait for each other."""
    global _timeout
    _timeout = seconds


def store() -> Any:
    """Return torch's store of the default process group, which all ranks read and write."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
