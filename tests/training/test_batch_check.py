"""Micro-batches are looked at before they run, on simulated devices: the map, the portions and the losses."""

from pathlib import Path

import pytest
import torch
import transformers

from tests import models
from tests.seams.cases import results_of

SAME = {"rel": 1e-4}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What batch_cases.py wrote. Short rows want another map than long ones, because of the head."""
    folder = tmp_path_factory.mktemp("batches")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**models.SIZES, "vocab_size": 2048})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    cases = Path(__file__).with_name("batch_cases.py")
    # Room here is a few MiB, which the allocator's segments alone would decide on.
    more = {"BALANCE_SIMULATE": "3x128MiB", "OMP_NUM_THREADS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    outcomes = results_of(cases, folder / "model", folder, **more)
    assert not {name: case["failed"] for name, case in outcomes.items() if "failed" in case}
    return outcomes


def lines(case, *phrases):
    return [line for line in case["log"] if all(phrase in line for phrase in phrases)]


@pytest.mark.parametrize(
    ("name", "configured"),
    [
        ("own data set", "own data set, configured"),
        ("stream", "own data set, configured"),
        ("LoRA", "LoRA, configured"),
    ],
)
def test_the_first_batch_brings_the_map_of_a_right_sequence_length(results, name, configured):
    """From its first step on a training on data that nobody can see has the map that BALANCE_SEQ_LEN would bring."""
    case, right = results[name], results[configured]
    if name == "LoRA":  # the other was loaded for full training, and blocks moved only if that gained 3 %
        assert max(case["predicted"]) <= max(right["predicted"])
    else:
        assert case["map"] == right["map"] and case["on"] == right["on"]
        assert case["predicted"] == right["predicted"]
    assert lines(case, "first batch:", "seq_len 2048 -> 320")
    assert not lines(right, "first batch:")


def test_the_first_batch_is_looked_at_without_a_trace(results):
    """No row is read ahead, the random numbers are those of a training without the shim, and so are the losses."""
    case, plain = results["own data set"], results["own data set, off"]
    for what in ("looked", "random", "forwards"):
        assert case[what] == plain[what]
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)


def test_a_list_of_numbers_is_seen_through_its_collator(results):
    """Items need not be mappings: what the trainer's collator makes of them is the batch."""
    assert lines(results["numbers"], "workload differs", "seq_len 2048 -> 96")
    assert not lines(results["numbers"], "first batch:")


def test_a_batch_that_fits_no_map_runs_in_portions(results):
    """Batches that no map holds run by fewer rows, within the devices, with the losses of whole ones, and one line."""
    case, plain = results["growing"], results["growing, off"]
    assert case["forwards"] == [[4, 16], [2, 240], [2, 240], [2, 330], [2, 330]]
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)
    assert max(case["peaks"]) <= 22 << 20 < max(plain["peaks"])
    assert len(lines(case, "warning", "run in portions")) == 1


def test_rows_that_a_loss_couples_stay_together(results):
    """A trainer with a loss of its own gets no portions that nobody asked for, but one line on what would fit."""
    case = results["growing, rows coupled"]
    assert case["forwards"] == [[4, 16], [4, 240], [4, 330]]
    assert len(lines(case, "warning", "runs as it is", "predicted not to fit")) == 1


def test_blocks_move_for_a_later_batch(results):
    """A later batch that does not fit under the map in force gets one under which it does; the losses stay."""
    case, plain = results["moves"], results["moves, off"]
    assert case["forwards"] == plain["forwards"]
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)
    assert max(case["peaks"]) <= 11 << 20 < max(plain["peaks"])
    assert len(lines(case, ": moved ")) == 2  # for the first batch, and for the one of 160 tokens; 170 need no more


def test_blocks_move_for_portions(results):
    """Where not even portions fit under the map in force, they get a map of their own."""
    case, plain = results["moved portions"], results["moves, off"]
    assert case["forwards"] == [[2, 16], [1, 160], [1, 160], [1, 170], [1, 170]]
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)
    assert max(case["peaks"]) <= 8 << 20


def test_more_layers_recompute_for_a_later_batch(results):
    """With BALANCE_GRADIENT_CHECKPOINTING=auto a later batch gets more recomputation before it is cut."""
    case, plain = results["recomputing"], results["moves, off"]
    assert case["forwards"] == plain["forwards"] and case["recomputed"]
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)
    assert max(case["peaks"]) <= 13 << 20


def test_ever_longer_batches_do_not_thrash(results):
    """Thirty lengths, each longer than all before, move blocks once at most where everything fits."""
    assert len(results["ever longer"]["forwards"]) == 31
    assert len(lines(results["ever longer"], ": moved ")) <= 1


def test_a_second_training_has_the_room_of_the_first(results):
    """Gradients and optimizer state that the first one left are the second one's own: not taken off, then added."""
    first, second = results["trained again"]["trainings"]
    assert second["capacities"] == first["capacities"] and second["predicted"] == first["predicted"]
    assert second["map"] == first["map"]


@pytest.mark.parametrize("number", [0, 1])
def test_the_model_of_model_init_is_the_one_that_is_planned(results, number):
    """Each model that `train` makes anew gets the map and the room of a model that is alone."""
    right = results["own data set, configured"]
    training = results["model_init"]["trainings"][number]
    assert training["map"] == right["map"] and training["on"] == right["on"]
    assert training["capacities"] == right["capacities"]
    assert results["model_init"]["forwards"] == results["model_init, off"]["forwards"]


def test_a_model_init_changes_no_loss(results):
    """What is prepared after the seed has been set draws nothing from it."""
    case, plain = results["model_init"], results["model_init, off"]
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)


def test_layers_are_chosen_in_the_model_of_model_init(results):
    """Recomputation is chosen for the model that trains, as it would be without model_init."""
    case = results["model_init, recomputing"]
    assert case["recomputed"] and max(case["peaks"]) <= 20 << 20


def test_each_fold_has_all_of_the_room(results):
    """A model a fold: each trains on the map that the first has, though it was loaded beside the one before."""
    first, *later = results["folds"]["trainings"]
    for training in later:
        assert training["map"] == first["map"] and training["capacities"] == first["capacities"]


def test_an_evaluation_is_part_of_the_plan(results):
    """Metrics of all logits fill the first device between steps: predicted within 4 %, and the map has room for it."""
    case, plain = results["evaluated"], results["evaluated, off"]
    for predicted, peak in zip(case["predicted"], case["peaks"], strict=True):
        assert peak == pytest.approx(predicted, rel=0.04, abs=64 << 10)
    assert any(
        "evaluation (4 x 200 tokens, logits, kept for 10 sequences) decides the peak" in note for note in case["notes"]
    )
    assert max(case["peaks"]) < 0.97 * max(plain["peaks"])
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)


def within(case, size):
    return max(case["peaks"]) <= size


def test_an_evaluation_that_does_not_fit_is_split_and_cuts_no_micro_batch(results):
    """Its batches run in portions, its outputs go to the host, one line says so, and micro-batches stay as they are."""
    case, plain = results["evaluated in no room"], results["evaluated, off"]
    assert case["forwards"] == plain["forwards"]
    assert case["evaluated"][:6] == [[2, 200]] * 4 + [[1, 200]] * 2 and within(case, 12 << 20)
    assert len(lines(case, "warning", "evaluation", "predicted not to fit", "in 2 portions", "host memory")) == 1
    assert not lines(case, "warning", "What would fit")


def test_an_evaluation_batch_that_nobody_could_see_is_looked_at_before_it_runs(results):
    """Longer rows than those of training show when they come: in portions they stay within the devices' room."""
    assert within(results["evaluated in portions"], 7 << 20) and within(results["loss in portions"], 7 << 20)
    for name in ("evaluated in portions", "loss in portions"):
        assert results[name]["evaluated"] == [[1, 200]] * 20
        assert len(lines(results[name], "warning", "evaluation", "predicted not to fit")) == 1


@pytest.mark.parametrize("name", ["evaluated in no room", "evaluated in portions", "loss in portions"])
def test_portions_of_an_evaluation_change_no_metric(results, name):
    """Losses are weighted by their labels, rows of all portions come in order, and training goes on as before."""
    case = results[name]
    plain = results["evaluated, off" if name == "evaluated in no room" else "evaluated in portions, off"]
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)
    assert len(case["metrics"]) == len(plain["metrics"]) == 2
    for metrics, right in zip(case["metrics"], plain["metrics"], strict=True):
        assert metrics == pytest.approx({key: right[key] for key in metrics}, **SAME)


def test_blocks_move_for_an_evaluation_that_cannot_be_split(results):
    """All layers leave the head's device before its first batch, once; training goes on with the same losses."""
    case, plain = results["evaluated on another map"], results["evaluated on another map, off"]
    assert len(lines(case, ": moved")) == 1 and not lines(case, "warning")
    assert within(case, 9 << 20) and case["evaluated"] == [[1, 400]] * 20
    layers = {case["map"][f"model.layers.{number}"] for number in range(6)}
    assert len(layers) == 1 and layers != {case["map"]["lm_head"]}
    places = {name: case["on"][name] for name in ("model.layers.5.mlp.up_proj.weight", "lm_head.weight")}
    assert list(places.values()) == [*layers, case["map"]["lm_head"]], "the map in force is where the layers are"
    assert any("evaluation" in note for note in case["notes"]), "what decides the plan is the evaluation now"
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)
    for metrics, right in zip(case["metrics"], plain["metrics"], strict=True):
        assert metrics == pytest.approx(right, **SAME)


def test_an_evaluation_that_no_map_holds_moves_blocks_once(results):
    """The map that comes closest stays in force, as the plan knows, and the losses are right all the same."""
    case, plain = results["evaluated where no map holds it"], results["evaluated on another map, off"]
    assert len(lines(case, "moved")) == 1
    assert len(lines(case, "warning", "evaluation", "predicted not to fit")) == 1
    assert case["losses"] == pytest.approx(plain["losses"], **SAME)
