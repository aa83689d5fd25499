"""Backward on a backend whose device guard is written in Python."""

import itertools
from typing import Any

import torch

_run_backward = torch.autograd.graph._engine_run_backward
_nothing: itertools.chain[None] = itertools.chain()


class Guard(torch._C._acc.DeviceGuard):
    """Tells torch's C++ side the type of the simulated devices, and rescues exceptions on their way through it.

    When an operation raises during backward, autograd's engine unwinds its stack with the Python exception still
    pending, and on that way asks this guard for the type, in a place where a failing call ends the process. So the
    pending exception is taken away here, and `run_backward` raises it once the engine has returned.
    """

    __slots__ = ()  # with an instance dictionary the look-up of `type_` itself would fail on the pending exception

    def type_(self) -> Any:  # a DeviceType; torch's stub names its base's argument instead
        try:
            any(_nothing)  # an exhausted iterator: the interpreter looks whether it ended because of an exception
        except BaseException as error:
            _pending.append(error)
        return torch._C._autograd.DeviceType.PrivateUse1


_pending: list[BaseException] = []


def run_backward(*args: Any, **kwargs: Any) -> Any:
    """Stand in for `torch.autograd.graph._engine_run_backward`.

    With threads the engine has one queue for each device that the guard reports, and a guard in Python cannot report
    more than one; without, it runs everything here, which on simulated devices is no slower.
    """
    try:
        with torch.autograd.set_multithreading_enabled(False):
            return _run_backward(*args, **kwargs)
    except SystemError:  # the engine reports an exception that is no longer there
        if not _pending:
            raise
        error = _pending[0]
    finally:
        _pending.clear()
    try:
        raise error
    finally:
        del error  # it refers to this frame: a cycle would keep the tensors in its traceback alive
