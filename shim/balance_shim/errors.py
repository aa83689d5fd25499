"""Exceptions that leave the package. Standard library only: these are imported while arming.

    RuntimeError
    └── BalanceError
        ├── DeviceMapError
        ├── LostModelError
        ├── ModelError
        ├── MoveError
        ├── ReplicaError
        ├── SettingError
        ├── SimulationError
        ├── UsageError
        └── ZeroError

Exceptions that one module raises for another to catch, and that no program sees, stand with the function that raises
them: `DoesNotFit`, `CannotTrace`, `SeamMoved` and their like.
"""


class BalanceError(RuntimeError):
    """An explicit request of the user that cannot be met; the message names the setting, its place and the remedy."""


class DeviceMapError(BalanceError):
    """A device map that cannot be read, or that does not fit the model or the machine."""


class LostModelError(BalanceError):
    """A model that is left between two maps. Not a `MoveError`, after which training can go on."""


class ModelError(BalanceError):
    """A model that cannot be found, or cannot be built from its config; the message is one line."""


class MoveError(BalanceError):
    """Blocks that could not be moved; the model works under its old map as before."""


class ReplicaError(BalanceError):
    """Replicas that `BALANCE_REPLICAS` asks for and that cannot be started."""


class SettingError(BalanceError):
    """A `BALANCE_*` variable, or an argument with the same meaning, whose value cannot be used."""


class SimulationError(BalanceError):
    """Simulated devices that cannot be set up in this process."""


class UsageError(BalanceError):
    """Options of a plan that cannot be met; each line of the message is about one of them."""


class ZeroError(BalanceError):
    """Mode `zero3` cannot meet a request, or its ranks have ended up with different states."""
