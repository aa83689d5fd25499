"""Micro-batches in flight on simulated devices: the checks of pipeline_checks.py and peak_checks.py, each as a test."""

from pathlib import Path

import pytest

from tests.simulation.child import checks_in, results_of

CHECKS = Path(__file__).with_name("pipeline_checks.py")
PEAKS = Path(__file__).with_name("peak_checks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    return results_of(CHECKS, folder, str(folder))


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peaks")
    return results_of(PEAKS, folder, str(folder))


@pytest.mark.parametrize("name", checks_in(CHECKS))
def test_micro_batches_in_flight(results, name):
    """Losses and gradients are those without `BALANCE_PIPELINE`, and what the name of the check says holds."""
    assert results[name] is None, results[name]


@pytest.mark.parametrize("name", checks_in(PEAKS))
def test_memory_of_micro_batches_in_flight(peaks, name):
    """Plans count the activations of all micro-batches in flight."""
    assert peaks[name] is None, peaks[name]
