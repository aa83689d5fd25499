"""Tensors and operations on simulated devices: the checks of the files below, each as a test."""

from pathlib import Path

import pytest

from tests.simulation.child import checks_in, results_of

TENSORS = Path(__file__).with_name("tensor_checks.py")
PARITY = Path(__file__).with_name("parity_checks.py")
CUDA = Path(__file__).with_name("cuda_checks.py")
SHAPES = Path(__file__).with_name("shape_checks.py")


@pytest.fixture(scope="module")
def value_results(tmp_path_factory):
    """What came of the checks with real numbers."""
    return results_of(TENSORS, tmp_path_factory.mktemp("tensors"))


@pytest.fixture(scope="module")
def parity_results(tmp_path_factory):
    """What came of the checks of what CUDA devices do."""
    return results_of(PARITY, tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def cuda_results(tmp_path_factory):
    """What came of the checks of a program that writes "cuda"."""
    return results_of(CUDA, tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def shape_results(tmp_path_factory):
    """What came of the checks with shapes only."""
    return results_of(SHAPES, tmp_path_factory.mktemp("shapes"))


@pytest.mark.parametrize("name", checks_in(TENSORS))
def test_with_numbers(value_results, name):
    """With real numbers, devices do what the name of the check says."""
    assert value_results[name] is None, value_results[name]


@pytest.mark.parametrize("name", checks_in(PARITY))
def test_like_cuda(parity_results, name):
    """Simulated devices do what the name of the check says, as CUDA devices do."""
    assert parity_results[name] is None, parity_results[name]


@pytest.mark.parametrize("name", checks_in(CUDA))
def test_by_the_name_of_cuda(cuda_results, name):
    """A program that writes "cuda" gets from simulated devices what the name of the check says."""
    assert cuda_results[name] is None, cuda_results[name]


@pytest.mark.parametrize("name", checks_in(SHAPES))
def test_with_shapes_only(shape_results, name):
    """With shapes only, devices do what the name of the check says."""
    assert shape_results[name] is None, shape_results[name]
