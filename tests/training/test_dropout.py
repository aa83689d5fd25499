"""Layers that are recomputed draw the dropout masks that they drew before, also at the borders between devices."""

from pathlib import Path

import pytest

from tests.simulation import child

CHECKS = Path(__file__).with_name("dropout_checks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return child.results_of(CHECKS, tmp_path_factory.mktemp("dropout"))


@pytest.mark.parametrize("name", child.checks_in(CHECKS))
def test_dropout(results, name):
    """Gradients with and without checkpointing are the same; the checks say of what."""
    assert results[name] is None, results[name]
