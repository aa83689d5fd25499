"""transformers' example scripts, which no wheel has, from a checkout that the caller names."""

import io
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

WITHIN = Path("examples", "pytorch")
VERSION = Path("src", "transformers", "__init__.py")


@dataclass(frozen=True)
class Examples:
    """The scripts of one version.

    Attributes:
        folder: `examples/pytorch`.
        version: of transformers, as the checkout has it.
    """

    folder: Path
    version: str


def examples(checkout: Path, version: str, place: Path) -> Examples:
    """Return the scripts of the tag `v<version>`, extracted below `place`; without that tag those that are checked out.

    Raises:
        SystemExit: there are no scripts in `checkout`.
    """
    tag = f"v{version}"
    command = ["git", "-C", str(checkout), "archive", "--format=tar", tag, str(WITHIN), str(VERSION)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode == 0:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(place / tag, filter="data")
        checkout = place / tag
    if not (checkout / WITHIN).is_dir():
        raise SystemExit(f"matrix: no example scripts in {checkout}: neither the tag {tag} nor the folder {WITHIN}")
    found = re.search(r'^__version__ = "(.*)"', (checkout / VERSION).read_text(), re.MULTILINE)
    return Examples(checkout.resolve() / WITHIN, found.group(1) if found else "unknown")
