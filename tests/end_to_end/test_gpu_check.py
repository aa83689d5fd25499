"""The check for machines with a GPU, on simulated devices: that it measures what it says, and ends with its results."""

import json

import pytest

from tests.processes import REPOSITORY, SHIM, output_of, python


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    result = tmp_path_factory.mktemp("stages") / "found.json"
    done = python("-m", "tests.end_to_end.stage_checks", str(result), paths=[SHIM, REPOSITORY], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def test_a_stage_alone_holds_what_it_holds_among_the_others(stages):
    """A device's share of a map, alone on a card, has within 2 % the peak that it has when all devices train."""
    for alone, together in zip(stages["alone"], stages["together"], strict=True):
        assert alone == pytest.approx(together, rel=0.02)


def test_the_page_has_a_line_on_how_true_predictions_are(stages):
    """The page of results lists the stages, with the error of each and the median and the worst of all."""
    assert "| 3 |" in stages["page"] and "median error" in stages["page"]


@pytest.mark.exhaustive
def test_the_check_runs_its_parts_and_writes_what_they_found(tmp_path):
    """One command runs the parts that are asked for, and leaves JSON and a page; an unknown part is refused."""
    command = [str(REPOSITORY / "benchmarks" / "gpu_check"), "--simulate", "8GiB", "--output", str(tmp_path)]
    done = python(*command, "--parts", "facts", "monitor", "attention", paths=[])
    assert done.returncode == 0, done.stderr[-3000:]
    parts = json.loads((tmp_path / "gpu-check.json").read_text())["parts"]
    assert [part["status"] for part in parts.values()] == ["done"] * 3
    assert parts["facts"]["records"][1]["device"].startswith("simulated")
    assert (tmp_path / "gpu-check.md").read_text().strip() == done.stdout.strip()
    assert python(*command, "--parts", "nothing", paths=[]).returncode == 2


def test_a_part_that_outlasts_its_time_is_listed_as_such(tmp_path):
    """A part that does not end in time is stopped, what it had found is kept, and the others go on."""
    code = f"""
        import sys
        sys.path[:0] = [{str(REPOSITORY / "benchmarks")!r}, {str(SHIM)!r}]
        from gpu_check.__main__ import _child
        print(_child("facts", 5.0, "1GiB")["status"], _child("facts", 1.0, "1GiB")["errors"])
    """
    assert output_of(code, paths=[]).endswith("not begun: no time was left")
