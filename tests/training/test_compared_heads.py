"""Models that one process compares, a student and its teacher, have their heads on one device and stay that way."""

from pathlib import Path

import pytest

from tests import models
from tests.seams.cases import results_of

LAYOUTS = ["alike", "larger first", "larger last", "small first"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What compared_cases.py wrote."""
    folder = tmp_path_factory.mktemp("compared")
    cases = Path(__file__).with_name("compared_cases.py")
    more = {"BALANCE_SIMULATE": "4x64MiB", "OMP_NUM_THREADS": "1"}
    return results_of(cases, models.saved_llama(folder / "model", vocab_size=4096), folder, **more)


def case_of(results, name):
    if name not in results:
        pytest.skip("written for TRL 1.x")
    assert "error" not in results[name], results[name]["traceback"]
    return results[name]


@pytest.mark.parametrize("name", [*(f"heads, {layout}" for layout in LAYOUTS), "logits, larger first", "rebalanced"])
def test_a_script_compares_student_and_teacher(results, name):
    """Heads are on one device from loading on, none is repaired, and the losses are those of one device."""
    case = case_of(results, name)
    one = results["logits, one device" if name.startswith("logits") else "heads, one device"]
    assert len(set(case["heads"])) == 1 and len(case["devices"]) > 2
    assert "met on different devices" not in case["log"]
    assert case["losses"] == pytest.approx(one["losses"], rel=1e-3)


def test_trl_compares_student_and_teacher(results):
    """TRL's DistillationTrainer, which refuses heads on two devices, trains with the losses of one device."""
    case = case_of(results, "TRL, larger last")
    assert len(set(case["heads"])) == 1 and len(case["devices"]) > 2
    assert case["losses"] == pytest.approx(results["TRL, one device"]["losses"], rel=1e-3)


def test_a_head_joins_one_that_the_script_has_placed(results):
    """The step that stops since the teacher's own map has its head elsewhere is repeated with both on its device."""
    case = case_of(results, "teacher of a map of its own")
    student_before, teacher_before, student, teacher = case["heads"]
    assert student_before != teacher_before and student == teacher == teacher_before
    assert "heads of models of one vocabulary are on one device now" in case["log"]
    assert case["losses"] == pytest.approx(results["heads, one device"]["losses"], rel=1e-3)


def test_the_second_models_table_is_told_from_the_first(results):
    """The heading of the teacher's table counts it, so that it does not look like the student's."""
    log = case_of(results, "heads, alike")["log"]
    headings = [line for line in log.splitlines() if "balanced map for LlamaForCausalLM" in line]
    assert "model 2 in this process" not in headings[0]
    assert "LlamaForCausalLM, model 2 in this process (" in headings[1]
