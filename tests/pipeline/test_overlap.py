"""Micro-batches in flight overlap: a step of a whole training takes less time on the clock of simulated devices."""

import json

import pytest

from tests.processes import REPOSITORY, SHIM, python

WORDS = ("-m", "benchmarks.pipeline", "--train", "--tokens", "8192", "--micro-batches", "4", "--tuning", "lora")


def step_of(in_flight):
    """Return the seconds of a step with so many micro-batches in flight, and standard error."""
    variables = {
        "BALANCE_SIMULATE": "4xRTX4090:shapes", "BALANCE_PIPELINE": in_flight, "BALANCE_REPORT": "off",
        "BALANCE_SEQ_LEN": "8192", "BALANCE_CACHE": "off",  # where other tests leave measured rates
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = python(*WORDS, paths=(SHIM, REPOSITORY), cwd=REPOSITORY, timeout=300, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"'))
    return json.loads(line)["seconds"], done.stderr


@pytest.mark.exhaustive
def test_four_in_flight_are_nearly_as_fast_as_a_pipeline_can_be():
    """Of 4 micro-batches on 4 devices the ideal is 16/7 times the speed; the head makes the last device slower."""
    alone, log = step_of("1")
    together, _ = step_of("4")
    assert alone / together > 0.8 * 16 / 7
    assert "reads the full logits" not in log, "lean transfers leave the loss in chunks"
