"""`BALANCE_MONITOR=1` and out-of-memory on simulated devices: planted faults are named, healthy runs left alone."""

from pathlib import Path

import pytest

from balance_shim import map_file
from tests import models
from tests.seams.cases import results_of

CASES = Path(__file__).with_name("monitor_cases.py")
LAYERS = 6


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What monitor_cases.py wrote: it trains a tiny model on four simulated devices of 8 MiB in each way."""
    folder = tmp_path_factory.mktemp("monitor")
    more = {"BALANCE_SIMULATE": "4x8MiB", "OMP_NUM_THREADS": "1"}
    outcomes = results_of(CASES, models.saved_llama(folder / "model"), folder, **more)
    assert not {name: case["failed"] for name, case in outcomes.items() if "failed" in case}
    return outcomes


def findings(case):
    return [finding for line in case["record"] for finding in line.get("findings", [])]


def alarms(case):
    """The warnings that are about memory while training: not those of a plan that does not fit."""
    marks = ("balance_shim: warning", "balance_shim: error")
    lines = [line for line in case["log"].splitlines() if line.startswith(marks)]
    return [line for line in lines if "predicted not to fit" not in line]


def explanation(case):
    """The message on an out-of-memory, with its further lines."""
    lines = case["log"].splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("balance_shim: error: out of memory")]
    assert len(starts) == 1, case["log"]
    end = next((n for n in range(starts[0] + 1, len(lines)) if not lines[n].startswith("  ")), len(lines))
    return "\n".join(lines[starts[0] : end])


@pytest.mark.parametrize("name", ["healthy", "varied, accumulated, evaluated", "unwatched", "finds a batch size"])
def test_no_alarm_on_clean_runs(results, name):
    """Nothing is reported, nor where the Trainer recovers from an out-of-memory by itself."""
    assert results[name]["error"] is None and not findings(results[name]) and not alarms(results[name])


def test_watching_changes_nothing(results):
    """Losses and peaks are those of a run that is not watched, the callback is gone, stdout has nothing of ours."""
    plain, watched = results["unwatched"], results["healthy"]
    assert watched["losses"] == plain["losses"] and watched["peaks"] == plain["peaks"]
    assert all(case["callbacks left"] for case in results.values())
    assert not any("balance_shim" in case["printed"] or "npu:" in case["printed"] for case in results.values())


def test_nothing_is_written_unless_asked_for(results):
    """Without the variable there is no record, no picture and no table: only the plan and what it is a plan for."""
    assert set(results["unwatched"]["files"]) == {"device_map.json", "plan.json", "run.json"}
    assert "memory of this training" not in results["unwatched"]["log"]


def test_the_record(results):
    """A line a step with each device's figures; the highest peak is that of the simulation itself."""
    record = results["varied, accumulated, evaluated"]["record"]
    assert [line["step"] for line in record] == list(range(1, 13))
    assert all(len(line["micro_batches"]) == 2 for line in record)
    assert len({line["tokens"] for line in record}) > 1
    for line in record:
        for figures in line["devices"].values():
            assert 0 < figures["allocated"] <= figures["peak"] and figures["reserved"] >= figures["allocated"]
    plain = results["healthy"]["record"]
    highest = [max(line["devices"][f"npu:{index}"]["peak"] for line in plain) for index in range(4)]
    assert highest == results["healthy"]["peaks"]


def test_the_record_names_capacity_and_prediction(results):
    """Whoever follows it needs no other file; run.json has what a plan needs, and names the record."""
    case = results["healthy"]
    figures = case["record"][-1]["devices"]["npu:0"]
    assert figures["total"] == 8 << 20 and abs(figures["predicted"] - figures["peak"]) < 0.02 * figures["peak"]
    run = case["run"]
    assert run["records"] == ["memory.jsonl"] and run["workload"]["batch_size"] == 2 and run["ranks"] == 1
    assert [card["name"] for card in run["devices"]] == [f"npu:{index}" for index in range(4)]
    (model,) = run["models"]
    assert model["class"] == "LlamaForCausalLM" and model["config"]["num_hidden_layers"] == LAYERS
    assert "_name_or_path" not in model["config"] and len(model["devices"]) == 4


def test_events_are_recorded(results):
    """What was found and said, with its kind; the parts of an explained out-of-memory are data."""
    assert not any(event["level"] == "error" for event in results["healthy"]["events"])
    events = {event["kind"]: event for event in results["keeps losses"]["events"]}
    assert events["kept"]["since"] == 4 and "list `losses`" in events["kept"]["text"]
    failure = events["out of memory"]
    assert failure["level"] == "error" and failure["table"][0][0] == "device" and failure["headline"] in failure["text"]
    assert (
        failure["remedies"] and failure["causes"] and failure["step"] == results["keeps losses"]["record"][-1]["step"]
    )


def test_the_table_and_the_picture(results):
    """Predicted stands beside measured for each device, within 2 % here, and the picture has a line a device."""
    log = results["healthy"]["log"]
    table = log[log.index("memory of this training") :].splitlines()[2:6]
    assert [row.split()[0] for row in table] == ["npu:0", "npu:1", "npu:2", "npu:3"]
    assert all(abs(float(row.split()[5].rstrip("%"))) < 2 for row in table)
    assert results["healthy"]["picture"].count("<polyline") == 4


def test_losses_kept_with_their_graphs(results):
    """Found with the list, the line that makes them, the step where it began; the out-of-memory that follows agrees."""
    case = results["keeps losses"]
    (alarm,) = [line for line in alarms(case) if "warning" in line]
    assert "since step 4," in alarm and "npu:0, npu:1, npu:2, npu:3" in alarm
    assert "in the list `losses` of module" in alarm and "each retains the graph that made it" in alarm
    assert "x ()" in alarm and "at monitor_cases.py:" in alarm and "in on_step_end" in alarm
    assert [finding["kind"] for finding in findings(case)] == ["kept"]
    assert "retained since step 4" in explanation(case) and "wrong" not in explanation(case)
    assert case["record"][-1]["unfinished"] is True


def test_hidden_states_kept_by_a_callback(results):
    """Found with the attribute of the callback, their shape and the module that makes them, on its device only."""
    (alarm,) = alarms(results["keeps states"])
    assert "list `states` of KeepsStates" in alarm and "x (2, 64, 64)" in alarm and "made by model.layers.3" in alarm
    (holder,) = [
        name
        for name, figures in results["keeps states"]["record"][-1]["devices"].items()
        if figures["allocated"] > results["keeps states"]["record"][0]["devices"][name]["allocated"] + 12 * 30000
    ]
    assert f"grows on {holder} since step 1," in alarm


def test_one_very_long_batch(results):
    """The step and how many times as large the batch is are named."""
    case = results["long batch"]
    (alarm,) = alarms(case)
    step = next(line["step"] for line in case["record"] if line["tokens"] == 240)
    assert f"the batch of step {step} is 15.0 times as large" in alarm and "240 tokens" in alarm


def test_a_second_process_and_a_device_that_starts_half_full(results):
    """Both are named as other processes' memory, with device and size, and are not taken for a leak."""
    (alarm,) = alarms(results["second process"])
    assert "other processes took 3.0 MiB of npu:2 by step" in alarm
    (alarm,) = alarms(results["half full"])
    assert "npu:1 starts 50% full: 4.0 MiB of 8.0 MiB are used by other processes" in alarm
    assert "4.0 MiB" in results["half full"]["log"].partition("memory of this training")[2]


RUNS_OUT = ["long batch", "map", "explicit map", "second process", "half full", "strict"]


@pytest.mark.parametrize("name", RUNS_OUT)
def test_the_original_error_is_raised_as_it_was(results, name):
    """Same class, same words, same innermost frame as where the device refused; also where failures of ours raise."""
    error = results[f"memory runs out: {name}"]["error"]
    assert error["type"] == "OutOfMemoryError" and error["innermost"] == "_allocate"
    assert len(error["args"]) == 1 and error["args"][0].startswith("Simulated device out of memory.")


def test_out_of_memory_by_a_long_batch(results):
    """Device, phase, block, batch, and that it is larger than any before; no map would have held it."""
    text = explanation(results["memory runs out: long batch"])
    assert "in the forward pass of model.layers." in text and "batch of 1 x 1500 tokens" in text
    assert "times as large as any before" in text and "no setting of the shim would have fit" in text


@pytest.mark.parametrize("name", ["map", "explicit map", "half full", "second process"])
def test_a_map_that_would_have_fitted(results, name):
    """Where other devices had room the message says so, and gives a map: whole, and on several devices."""
    case = results[f"memory runs out: {name}"]
    text = explanation(case)
    assert "had room: the " in text and "was wrong" in text and "remedy 1:" in text
    assert "device_map_that_fits.json" in text and case["fits"] is not None
    names = set(case["fits"])
    assert {f"model.layers.{number}" for number in range(LAYERS)} | {"lm_head"} <= names
    assert len(set(case["fits"].values())) > 1


def test_out_of_memory_by_a_wrong_map(results):
    """The user's map is said to be wrong, with predicted beside measured, and the remedies as variables to set."""
    text = explanation(results["memory runs out: map"])
    assert "out of memory on npu:0 in the forward pass of model.layers." in text
    assert "cause: the map that was given is wrong" in text and "remedy 1: BALANCE_DEVICE_MAP=" in text
    assert "remedy 2: BALANCE_GRADIENT_CHECKPOINTING=1 (predicted" in text
    row = next(line for line in text.splitlines() if "npu:0 <-" in line).split()
    assert float(row[2]) > 8 > float(row[6]) - 0.5  # the plan knew; what was measured is where it stopped
    explicit = explanation(results["memory runs out: explicit map"])
    assert "as device_map= in the script" in explicit and "BALANCE_PRECISION=bf16 (predicted" in explicit


def test_out_of_memory_by_others(results):
    """Others are the cause, with what they have of the device."""
    text = explanation(results["memory runs out: second process"])
    assert "cause: other processes use 7.0 MiB of the 8.0 MiB of npu:2" in text
    text = explanation(results["memory runs out: half full"])
    assert "cause: other processes use 4.0 MiB of the 8.0 MiB of npu:0" in text


def test_a_map_that_fits_is_one_that_the_shim_reads(results, tmp_path):
    """What was written is a device map as BALANCE_DEVICE_MAP takes it."""
    path = tmp_path / "map.json"
    map_file.write(results["memory runs out: map"]["fits"], str(path))
    assert map_file.read(str(path)).entries == results["memory runs out: map"]["fits"]
