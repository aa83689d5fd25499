"""Moving blocks in place, on simulated devices with real numbers: the checks of move_checks.py and move_failures.py."""

from pathlib import Path

import pytest

from tests.simulation.child import checks_in, results_of

CHECKS = Path(__file__).with_name("move_checks.py")  # it runs those of the other file, too
FAILURES = Path(__file__).with_name("move_failures.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of the checks."""
    return results_of(CHECKS, tmp_path_factory.mktemp("move"))


@pytest.mark.parametrize("name", [*checks_in(CHECKS), *checks_in(FAILURES)])
def test_move(results, name):
    """After a move, training and model are what the name of the check says, to the last bit and byte."""
    if "adapters" in name:
        pytest.importorskip("peft")
    assert results[name] is None, results[name]
