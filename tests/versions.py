"""Run the trainers of the matrix on many versions, each in an environment of its own, and write docs/matrix.md.

    python tests/versions.py                                      # all: some hours and 15 GB of environments
    python tests/versions.py --environment transformers-5.24.0 --training TRL --mode balanced

    python tests/versions.py --transformers-checkout ../transformers --training run_clm

The last one runs transformers' own example scripts, which no wheel has: of the tag of each environment's version where
the folder is a clone that has it, else those that are checked out.

A cell that was run takes the place of its earlier mark. Not part of `make test-all`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.matrix.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
