"""Whether a plan fits, said beforehand, against what happens."""

import json
from pathlib import Path

import pytest

from tests.sampling import sampled
from tests.simulation.child import run_script

SEEDS = {"text": range(12), "lora": range(6), "autocast": range(6), "experts": range(6), "pictures": range(6)}


@pytest.mark.parametrize("kind", sampled(SEEDS, "lora", mark="sweep"))
def test_what_a_plan_says_of_fitting_is_so(kind, tmp_path):
    """What is said to fit trains on devices of those sizes; what is not, trains under no contiguous map.

    Random models, workloads and devices, with a quarter of a MiB more or less for inputs, which plans do not count.
    """
    result = tmp_path / "results.json"
    script = Path(__file__).with_name("fits_checks.py")
    done = run_script(script, str(result), kind, *map(str, SEEDS[kind]))
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(result.read_text())
    assert [outcome for outcome in results if outcome["wrong"]] == []
    assert {outcome["method"] for outcome in results} == {"traced"}
    predictions = [outcome["prediction"] for outcome in results]
    assert predictions.count("fits") >= 2 and predictions.count("does not fit") >= 2
