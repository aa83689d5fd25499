"""Reading report folders: whole, half-written, damaged, of several runs, and of other versions."""

import json
import random

import pytest

from balance_shim.cli.main import main
from balance_shim.errors import UsageError
from balance_shim.report import folder, run_record
from tests.report import folders


def test_a_whole_folder(tmp_path):
    """Plan, steps, events of this run and machine are read, and nothing is remarked."""
    said = [folders.event("repair", "old", time=10.0), folders.event("move", "new")]
    run = folder.read(str(folders.write(tmp_path, **{"events.jsonl": folders.lines(said)})))
    assert not run.remarks and [plan.number for plan in run.plans] == [1]
    assert [step.step for step in run.records[0].steps] == list(range(1, 7))
    assert [event.text for event in run.events] == ["new"]  # the other is of an earlier run in the same folder
    assert run.records[0].highest("peak") == {"cuda:0": 700 * folders.MIB, "cuda:1": 710 * folders.MIB}


def test_files_of_earlier_runs_are_left_out(tmp_path):
    """The latest run's numbers count; without run.json, as older versions left it, the newest files do."""
    second = {"memory-2.jsonl": folders.lines([folders.step(1)]), "plan-2.json": json.dumps(folders.plan("Second"))}
    model = folders.run()["models"][0]
    latest = folders.run(records=["memory-2.jsonl"], models=[{**model, "number": 2}])
    run = folder.read(str(folders.write(tmp_path, **second, **{"run.json": json.dumps(latest)})))
    assert [plan.model_class for plan in run.plans] == ["Second"] and len(run.records[0].steps) == 1
    (tmp_path / "run.json").unlink()
    run = folder.read(str(tmp_path))
    assert [plan.model_class for plan in run.plans] == ["LlamaForCausalLM", "Second"] and len(run.records[0].steps) == 1


def test_impossible_figures_are_left_out(tmp_path):
    """Bytes below 0 or beyond any memory are damage; a busy share that is none is unknown."""
    wrong = [{"peak": -5}, {"peak": 1e300}, {"peak": 5, "total": -1}, {"peak": 7, "busy": float("nan")}]
    steps = [{**folders.step(number), "devices": {"cuda:0": reading}} for number, reading in enumerate(wrong)]
    folders.write(tmp_path, **{"memory.jsonl": folders.lines(steps)})
    (record,) = folder.read(str(tmp_path)).records
    assert [step.step for step in record.steps] == [3] and record.skipped == 3
    assert record.highest("peak") == {"cuda:0": 7} and not record.last("busy")


@pytest.mark.parametrize(
    ("files", "remark"),
    [
        ({"memory.jsonl": folders.lines([folders.step(1)]) + '{"step": 2, "sec'}, "the last line of memory.jsonl"),
        ({"memory.jsonl": folders.lines([folders.step(1)]) + "garbage\n" + folders.lines([folders.step(2)])}, "1 line"),
        ({"plan.json": '{"mode": "bal'}, "plan.json is not complete JSON"),
        ({"plan.json": '{"mode": "balanced"}'}, "plan.json does not have the fields"),
        ({"run.json": ""}, "run.json is not complete JSON"),
        ({"run.json": '{"format": 1}'}, "run.json does not have the fields"),
        ({"run.json": json.dumps(folders.run(libraries=["torch"]))}, "run.json does not have the fields"),
        ({"events.jsonl": folders.lines([folders.event("move", "x")]) + '{"time": 3'}, "events.jsonl: 1 line"),
        ({"simulation.json": "[{}]"}, "simulation.json does not have the fields"),
    ],
)
def test_damaged_parts_are_remarked_and_left_out(tmp_path, files, remark, capsys):
    """Each gives one line, on standard error and on the page, which is written all the same."""
    folders.write(tmp_path, **files)
    assert main(["report", str(tmp_path), "--quick"]) == 0
    output, errors = capsys.readouterr()
    assert output == f"{tmp_path / 'report.html'}\n"
    (line,) = errors.splitlines()
    assert line.startswith("balance-shim report: ") and remark in line
    assert remark in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"run.json": None, "plan.json": None, "memory.jsonl": None}, "has no record of a training"),
        ({"run.json": "x", "plan.json": "x", "memory.jsonl": None}, "nothing is left to report"),
        (
            {"run.json": json.dumps({**folders.run(), "format": run_record.FORMAT + 1, "balance_shim": "9.0"})},
            "written by balance_shim 9.0",
        ),
    ],
)
def test_folders_without_anything_to_report(tmp_path, files, words, capsys):
    """Exit code 2, one line, and no page."""
    folders.write(tmp_path, **files)
    assert main(["report", str(tmp_path), "--quick"]) == 2
    output, errors = capsys.readouterr()
    assert not output and len(errors.splitlines()) == 1 and words in errors
    assert not (tmp_path / "report.html").exists()


def test_places_that_are_no_folder(tmp_path, capsys):
    """A missing folder, a file, and a page that cannot be written: one line each, and no half-written file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        folder.read(str(tmp_path / "file"))
    with pytest.raises(UsageError, match="does not exist"):
        folder.read(str(tmp_path / "missing"))
    there = folders.write(tmp_path / "run")
    assert main(["report", str(there), "--quick", "-o", str(tmp_path / "no" / "page.html")]) == 2
    assert main(["report", str(there), "--quick", "-o", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2 and not list(tmp_path.rglob("*.part"))


STRANGE = (None, "x", -1, float("inf"), float("nan"), [], {}, True, [[]], {"a": 1})


def _damaged(value, chance):
    """Return a copy of `value` of which some parts are missing and some have another type."""
    if chance.random() < 0.03:
        return chance.choice(STRANGE)
    if isinstance(value, dict):
        return {name: _damaged(part, chance) for name, part in value.items() if chance.random() > 0.02}
    return [_damaged(part, chance) for part in value] if isinstance(value, list) else value


def test_no_damage_ends_in_a_traceback(tmp_path, capsys):
    """Values of any type in any place: a page or one line that names a file, and never a failure of the command."""
    grows = {"kind": "kept", "since": 1, "text": "x"}
    failed = folders.event("out of memory", "x", table=[["a"], ["b"]], causes=["c"], remedies=["d"], step=3)
    timed = folders.plan(step_time={"seconds": 1, "tokens_per_second": 3, "busy": [0.1, 0.2], "bound": "host"})
    for number in range(25):
        chance = random.Random(number)
        steps = [_damaged(folders.step(step, findings=[grows]), chance) for step in (1, 2, 3)]
        files = {
            "plan.json": json.dumps(_damaged(timed, chance)),
            "run.json": json.dumps(_damaged(folders.run(), chance)),
            "memory.jsonl": folders.lines(steps),
            "events.jsonl": folders.lines([_damaged(failed, chance)]),
        }
        path = str(folders.write(tmp_path / str(number), **files))
        assert main(["report", path, "--quick"]) in (0, 2) and main(["top", path, "--once"]) in (0, 2)
        assert "cannot be shown" not in capsys.readouterr().err, number
