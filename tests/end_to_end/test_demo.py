"""`make demo`, on simulated devices."""

import sys

import pytest

from tests.end_to_end.run import REPOSITORY, run_command

pytestmark = pytest.mark.exhaustive


def test_demo_shows_the_difference():
    """SmolLM2 trains to the same losses, and on devices of a size where only the balanced run does."""
    outcome = run_command([sys.executable, str(REPOSITORY / "benchmarks" / "demo.py"), "--steps=2"], timeout=1200)
    outcome.expect_success()
    lines = [line.split() for line in outcome.stdout.splitlines() if line.strip()]
    without, with_shim = (line[1:] for line in lines if line[0] in ("without", "with") and line[1][0].isdigit())
    assert len(without) == 2
    assert with_shim == without
    assert any(line[:2] == ["without", "torch.OutOfMemoryError:"] for line in lines)
    assert any(line[:3] == ["with", "trains,", "losses"] for line in lines)
