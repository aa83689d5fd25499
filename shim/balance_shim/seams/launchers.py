"""Programs that start their ranks themselves, ms-swift and LLaMA-Factory: here they are about to read how many."""

from types import ModuleType

from .. import modes


def apply(module: ModuleType) -> None:
    """Report the launcher in `module`, such as `swift.cli.main`.

    Raises:
        BalanceError: ranks are asked for that cannot be started.
    """
    modes.current().before_launcher(module.__name__.partition(".")[0])
