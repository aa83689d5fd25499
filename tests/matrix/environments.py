"""Environments of the matrix: which packages each has, and how it is made."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("MATRIX_ENVIRONMENTS", REPOSITORY / ".venv" / "matrix"))
TORCH = os.environ.get("TORCH", "torch==2.13.0")


@dataclass(frozen=True)
class Environment:
    """One set of versions.

    Attributes:
        name: of its folder.
        packages: what pip installs in one go, after torch.
    """

    name: str
    packages: tuple[str, ...]

    @property
    def python(self) -> Path:
        return FOLDER / self.name / "bin" / "python"

    def create(self) -> None:
        """Make it, unless it is there.

        Raises:
            subprocess.CalledProcessError: pip finds no such versions, or none that go together.
        """
        finished = FOLDER / self.name / ".finished"
        requirements = "\n".join((TORCH, *self.packages))
        if finished.exists() and finished.read_text() == requirements:
            return
        print(f"matrix: installing {self.name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER / self.name)], check=True)
        pip = [str(self.python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, TORCH], check=True)
        # DeepSpeed builds from source, and needs what is installed already.
        subprocess.run([*pip, "setuptools", "wheel", "ninja", "py-cpuinfo", "packaging", "numpy"], check=True)
        subprocess.run([*pip, "--no-build-isolation", *self.packages, TORCH], check=True)
        finished.write_text(requirements)


COMMON = ("wrapt", "datasets", "einops", "sentencepiece", "pillow")


def of_transformers(version: str, accelerate: str, *more: str) -> Environment:
    packages = (f"transformers=={version}", f"accelerate=={accelerate}", "deepspeed", "evaluate", *COMMON, *more)
    return Environment(f"transformers-{version}", packages)


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        of_transformers("4.45.2", "1.0.1", "peft==0.15.2"),
        of_transformers("4.51.3", "1.6.0", "peft==0.15.2", "trl==0.19.1"),
        of_transformers("4.57.6", "1.12.0", "peft==0.18.1", "trl==0.29.1"),
        of_transformers("5.0.0", "1.12.0", "peft"),
        of_transformers(
            "5.24.0", "1.15.0", "peft", "trl==1.16.0", "sentence-transformers", "setfit", "bitsandbytes", "torchao"
        ),
        Environment("ms-swift-3.12.6", ("ms-swift==3.12.6", "deepspeed", *COMMON)),
        Environment("ms-swift-4.6.0", ("ms-swift==4.6.0", "deepspeed", *COMMON)),
        Environment("llamafactory-0.9.5", ("llamafactory==0.9.5", "deepspeed", *COMMON)),
    )
}
