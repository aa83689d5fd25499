"""The clock of simulated devices: the checks of the file below, each as a test."""

from pathlib import Path

import pytest

from tests.simulation.child import checks_in, results_of

CLOCK = Path(__file__).with_name("clock_checks.py")


@pytest.fixture(scope="module")
def clock_results(tmp_path_factory):
    """What came of the checks."""
    return results_of(CLOCK, tmp_path_factory.mktemp("clock"))


@pytest.mark.parametrize("name", checks_in(CLOCK))
def test_clock(clock_results, name):
    """The clock gives programs the time that the name of the check says."""
    assert clock_results[name] is None, clock_results[name]
