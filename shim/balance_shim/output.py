"""Standard output of the commands: a reader that has seen enough (`| head`) is no error."""

import os
import sys


def show(text: str = "") -> None:
    """Print `text` and a line break at once; from a closed pipe on, discard everything."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the interpreter must not try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
