"""Micro-batches in flight on simulated devices: the checks of pipeline_checks.py, each as a test."""

from pathlib import Path

import pytest

from tests.simulation.child import checks_in, results_of

CHECKS = Path(__file__).with_name("pipeline_checks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    return results_of(CHECKS, folder, str(folder))


@pytest.mark.parametrize("name", checks_in(CHECKS))
def test_micro_batches_in_flight(results, name):
    """Losses and gradients are those without `BALANCE_PIPELINE`, and what the name of the check says holds."""
    assert results[name] is None, results[name]
