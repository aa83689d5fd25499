"""Exceptions that the shim raises. Standard library only: imported while arming."""


class BalanceError(RuntimeError):
    """An explicit request of the user that cannot be met; the message names what, where, and what to do."""


class SettingError(BalanceError):
    """A `BALANCE_*` variable, or an argument with the same meaning, whose value cannot be used."""


class DeviceMapError(BalanceError):
    """A device map that cannot be read, or that does not fit the model or the machine."""


class SimulationError(BalanceError):
    """Simulated devices that cannot be set up in this process."""
