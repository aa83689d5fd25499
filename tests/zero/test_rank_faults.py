"""A sample of `benchmarks/rank_faults.py`: one rank does something else, and a line names it and the cause."""

import signal

import pytest

from benchmarks.rank_faults import Case, make_model, run
from tests.sampling import sampled

CASES = {
    "gradients on one rank only": Case("lacks gradients", "first step", 1, 2, signal.SIGINT, 0),
    "exit code": Case("exits", "evaluation", 1, 2, signal.SIGINT, 0),
    "pictures on one rank only": Case("lacks pictures", "evaluation", 0, 2, signal.SIGINT, 0),
    "Ctrl-C while loading": Case("interrupted", "load", 0, 2, signal.SIGINT, 0.5),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("rank-faults") / "model")


@pytest.mark.parametrize("name", sampled(CASES, "gradients on one rank only", mark="sweep"))
def test_one_rank_does_something_else(name, model, tmp_path):
    """The line, the exit code, the time and the processes that are left are as the benchmark judges them."""
    outcome = run(CASES[name], model, tmp_path)
    assert outcome.problems == (), outcome
