"""The clock of simulated devices: the checks of the file below, each as a test."""

from pathlib import Path

import pytest

from tests.simulation.child import checks_in, results_of

CLOCK = Path(__file__).with_name("clock_checks.py")


@pytest.fixture(scope="module")
def by_the_clock(tmp_path_factory):
    """What came of the checks."""
    return results_of(CLOCK, tmp_path_factory.mktemp("clock"))


@pytest.mark.parametrize("name", checks_in(CLOCK))
def test_clock(by_the_clock, name):
    """The clock gives programs the time that the name of the check says."""
    assert by_the_clock[name] is None, by_the_clock[name]
