"""The seams of transformers, frozen version by version: what the shim relies on is there, in this one and in all.

A new version of transformers is taken in by recording it (`python tests/contracts/record.py 5.24.0`), reading what
changed, and letting these tests say what no longer holds.
"""

import inspect
import json

import pytest

from balance_shim.seams import KNOWN_TO_WORK
from balance_shim.seams.loss import DIVIDES_AS_IT_IS
from balance_shim.seams.trainer import COUNTS_ITEMS_APART_SINCE, COUNTS_ITEMS_SINCE, LOOKS_TOO_EARLY
from balance_shim.upstream.tensor_parallel_trap import TENSOR_PARALLEL_TRAP
from balance_shim.versions import numbers, version_text
from tests.contracts import record

RECORDED = json.loads(record.RECORD.read_text())
VERSIONS = [pytest.param(version, seams, id=version) for version, seams in RECORDED.items()]


def test_the_installed_version_is_recorded_and_has_not_changed():
    """What runs here is what was read when its version was recorded."""
    assert record.installed() == RECORDED[version_text("transformers")]


def test_the_versions_said_to_work_are_those_recorded():
    """The warning on an unknown version names the range that is recorded."""
    oldest, newest = next(iter(RECORDED)), list(RECORDED)[-1]
    assert KNOWN_TO_WORK["transformers"] == (oldest, newest)


@pytest.mark.parametrize(("version", "seams"), VERSIONS)
def test_where_a_string_becomes_a_map(version, seams):
    """From 4.50 on a function of its own, found by name in modeling_utils; before, inside from_pretrained."""
    own_function = numbers(version) >= (4, 50)
    assert seams["modeling_utils.py: calls _get_device_map"] == own_function
    assert seams["modeling_utils.py: calls infer_auto_device_map"] == (numbers(version) < (5,))
    where = "modeling_utils.py" if numbers(version) < (5,) else "integrations/accelerate.py"
    parameters = seams[f"{where}:_get_device_map"]
    assert (parameters is not None) == own_function
    if own_function:
        assert parameters[:4] == ["model", "device_map", "max_memory", "hf_quantizer"]
        in_4 = {"dtype", "torch_dtype"} & set(parameters)
        assert bool(in_4) == (numbers(version) < (5,))


@pytest.mark.parametrize(("version", "seams"), VERSIONS)
def test_from_pretrained_takes_device_map_by_keyword_only(version, seams):
    """device_map and max_memory stand in **kwargs, so the wrapper finds them there in every version."""
    parameters = seams["modeling_utils.py:PreTrainedModel.from_pretrained"]
    assert parameters[:3] == ["cls", "pretrained_model_name_or_path", "*model_args"] and parameters[-1] == "**kwargs"
    assert "device_map" not in parameters and "max_memory" not in parameters


@pytest.mark.parametrize(("version", "seams"), VERSIONS)
def test_versions_with_the_tensor_parallel_trap(version, seams):
    """Exactly the versions that the wrapper saves from it turn "auto" into a tensor-parallel plan."""
    oldest, fixed = TENSOR_PARALLEL_TRAP
    assert seams["modeling_utils.py: traps auto into tensor parallelism"] == (oldest <= numbers(version) < fixed)


@pytest.mark.parametrize(("version", "seams"), VERSIONS)
def test_how_layers_and_ties_are_declared(version, seams):
    """A method collects unsplittable classes up to 5.0, an attribute does after; ties are announced from 5.0 on."""
    has_method = seams["modeling_utils.py:PreTrainedModel._get_no_split_modules"] is not None
    assert has_method == (numbers(version) < (5, 1))
    assert seams["modeling_utils.py: announces ties"] == (numbers(version) >= (5,))


@pytest.mark.parametrize(("version", "seams"), VERSIONS)
def test_how_quantizers_say_sizes(version, seams):
    """transformers 5 has a size for each parameter, 4.x a dtype for all and exceptions by name."""
    if numbers(version) >= (5,):
        assert seams["quantizers/base.py:HfQuantizer.param_element_size"] == ["self", "model", "param_name", "param"]
    else:
        assert seams["quantizers/base.py:HfQuantizer.adjust_target_dtype"] == ["self", "torch_dtype"] or (
            seams["quantizers/base.py:HfQuantizer.adjust_target_dtype"] == ["self", "dtype"]
        )
        assert seams["quantizers/base.py:HfQuantizer.get_special_dtypes_update"][:2] == ["self", "model"]
    assert "**kwargs" in seams["quantizers/base.py:HfQuantizer.validate_environment"]


@pytest.mark.parametrize(("version", "seams"), VERSIONS)
def test_where_the_trainer_is_patched(version, seams):
    """The methods exist, and label tokens are counted where the wrapper of that version is."""
    assert seams["trainer.py:Trainer.train"][:2] == ["self", "resume_from_checkpoint"]
    assert seams["trainer.py:Trainer.training_step"][:3] == ["self", "model", "inputs"]
    assert seams["training_args.py:TrainingArguments.__post_init__"] == ["self"]
    assert seams["trainer.py: says is_model_parallel"]
    counts = seams["trainer.py:Trainer.get_batch_samples"] is not None
    assert counts == (numbers(version) >= COUNTS_ITEMS_SINCE)
    apart = seams["trainer.py:Trainer._get_num_items_in_batch"] is not None
    assert apart == (numbers(version) >= COUNTS_ITEMS_APART_SINCE)


@pytest.mark.parametrize(("version", "seams"), VERSIONS)
def test_versions_that_look_too_early_for_the_best_checkpoint(version, seams):
    """Exactly those in which the wrapper waits are without a barrier there; it hands on what `save_model` takes."""
    looks, waits = (seams[f"trainer.py: {what}"] for what in ("looks for the best checkpoint", "waits before it looks"))
    oldest, fixed = LOOKS_TOO_EARLY
    assert (looks and not waits) == (oldest <= numbers(version) < fixed)
    assert seams["trainer.py:Trainer.save_model"] == ["self", "output_dir", "_internal_call"]


@pytest.mark.parametrize(("version", "seams"), VERSIONS)
def test_where_the_loss_is_divided(version, seams):
    """The versions in which the loss function is patched have it, and do not move the token count themselves."""
    oldest, fixed = DIVIDES_AS_IT_IS
    assert seams["loss/loss_utils.py: moves the token count to the loss"] == (numbers(version) >= fixed)
    if numbers(version) >= oldest:
        parameters = seams["loss/loss_utils.py:fixed_cross_entropy"]
        assert parameters[:3] == ["source", "target", "num_items_in_batch"]


@pytest.mark.parametrize(("version", "seams"), VERSIONS)
def test_where_deepspeed_is_set_up(version, seams):
    """The config comes from TrainingArguments.deepspeed, is completed with the model, and is only weakly held."""
    del version
    config = "integrations/deepspeed.py:HfTrainerDeepSpeedConfig"
    assert seams[f"{config}.trainer_config_process"][:2] == ["self", "args"]
    assert seams[f"{config}.trainer_config_finalize"] == ["self", "args", "model", "num_training_steps"]
    assert seams["integrations/deepspeed.py:deepspeed_load_checkpoint"][:2] == ["deepspeed_engine", "checkpoint_path"]
    assert seams["training_args.py: makes the DeepSpeed config from self.deepspeed"]
    assert seams["training_args.py: asks for bf16 by name"]
    assert seams["integrations/deepspeed.py: keeps a weak reference to the config"]
    assert seams["trainer.py: loads DeepSpeed checkpoints by name"]


def test_deepspeed_and_accelerate_have_what_zero3_needs():
    """The functions of both that are patched, the engine's attributes that are read, and names that are set."""
    from accelerate.state import PartialState
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch.distributed import distributed_c10d

    assert list(inspect.signature(PartialState._prepare_backend).parameters)[:2] == ["self", "cpu"]
    assert callable(DeepSpeedEngine.zero_optimization_stage)
    assert "self.world_size" in inspect.getsource(DeepSpeedEngine)
    assert "self.load_universal_checkpoint" in inspect.getsource(DeepSpeedConfig)
    assert hasattr(distributed_c10d, "default_pg_timeout")


def test_auto_classes_lead_to_the_base_class():
    """The auto classes load through PreTrainedModel.from_pretrained, so one seam serves both."""
    from transformers.models.auto import auto_factory

    source = inspect.getsource(auto_factory._BaseAutoModelClass.from_pretrained.__func__)
    assert source.count("model_class.from_pretrained(") >= 1


def test_accelerate_counts_entries_of_a_map():
    """A map of one device must be one entry: accelerate takes several entries for several devices."""
    from accelerate import Accelerator

    assert "len(m.hf_device_map) > 1" in inspect.getsource(Accelerator.verify_device_map)


def test_accelerate_sizes_modules_by_dtype_and_exceptions():
    """The sizes of quantized 4.x models come from this function's keywords."""
    from accelerate.utils.modeling import compute_module_sizes

    assert {"dtype", "special_dtypes"} <= set(inspect.signature(compute_module_sizes).parameters)
