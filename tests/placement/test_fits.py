"""Whether a plan fits, said beforehand, against what happens."""

import json
from pathlib import Path

import pytest

from tests.simulation.child import run_script

SEEDS = range(24)


@pytest.mark.slow
def test_what_a_plan_says_of_fitting_is_so(tmp_path):
    """What is said to fit trains on devices of those sizes; what is not, trains under no contiguous map.

    Random models, workloads and devices, with a quarter of a MiB more or less for inputs, which plans do not count.
    """
    result = tmp_path / "found.json"
    done = run_script(Path(__file__).with_name("fits_checks.py"), str(result), *map(str, SEEDS))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(result.read_text())
    assert [each for each in found if each["wrong"]] == []
    said = [each["says"] for each in found]
    assert said.count("fits") >= 5 and said.count("does not fit") >= 5
