"""Question answering, CTC and pictures on some steps train on four simulated devices as on one."""

from pathlib import Path

import pytest

from balance_shim.versions import version_of
from tests.seams.cases import results_of

pytestmark = pytest.mark.skipif(version_of("transformers") < (5, 0), reason="its models are configured for 5.x")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    cases = Path(__file__).with_name("kinds_cases.py")
    return results_of(cases, folder, folder, BALANCE_SIMULATE="4x64MiB", OMP_NUM_THREADS="1")


@pytest.mark.parametrize("name", ["bert", "wav2vec2", "mllama"])
def test_a_kind_trains_with_the_losses_of_one_device(results, name):
    """The first map runs, nothing has to be repaired, and losses are those of one device."""
    case, one = results[name], results[f"{name}, one device"]
    assert "error" not in one, one["traceback"]
    assert "error" not in case, case["traceback"]
    assert len(one["losses"]) == 4 and len(set(case["map"].values())) > 1
    assert case["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert not any("met on different devices" in line for line in case["log"])
