"""Errors raised when a model cannot be traced."""

import contextlib
import warnings
from collections.abc import Iterator


class CannotTrace(Exception):
    """This model, or this part of it, cannot be traced; the message gives the reason."""


class TakesTooLong(CannotTrace):
    """Nor can it be traced in another way."""


@contextlib.contextmanager
def tracing_errors() -> Iterator[None]:
    """Turn whatever goes wrong in the body into `CannotTrace`, and keep warnings back.

    The libraries will log the same in the real training.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CannotTrace:
        raise
    except (Exception, SystemExit) as error:
        raise CannotTrace(f"tracing failed ({type(error).__name__}: {error})") from error
