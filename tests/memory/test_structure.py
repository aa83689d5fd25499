"""The structure of a model: computed once for a request, and read by all who plan for it."""

from balance_shim.device import Device
from balance_shim.memory import training_case
from balance_shim.memory.blocks import Block
from balance_shim.memory.structure import ModelStructure, structure_of
from balance_shim.memory.training_case import TrainingCase
from balance_shim.memory.workload import Workload
from balance_shim.placement import planner
from balance_shim.placement.request import Request
from tests import models

DEVICES = tuple(Device(index, f"cuda:{index}", 1 << 30, 1 << 30) for index in range(2))


def block(name, role):
    return Block(name, "Module", role, (f"{name}.weight",), ())


def test_the_ends_of_a_language_model_are_known():
    """Inputs enter at the embedding; norm and head are behind the last layer; a tied weight is one group."""
    structure = structure_of(models.llama(tie_word_embeddings=True))
    assert structure.entry == {"model.embed_tokens"} and structure.named("head") == {"lm_head"}
    assert [block.name for block in structure.end if block.parameters] == ["model.norm", "lm_head"]
    assert structure.ties == (frozenset({"lm_head.weight", "model.embed_tokens.weight"}),)
    assert structure.named("layer") == structure.layers


def test_towers_in_one_module_are_separate():
    """A vision and an audio tower next to the language model, all below `model`, are two towers."""
    roles = {"model.visual.patch": "tower", "model.visual.blocks.0": "tower", "model.audio.layers.0": "tower",
             "model.text.embed": "embedding", "model.text.layers.0": "layer", "head": "head"}  # fmt: skip
    structure = ModelStructure("Omni", tuple(block(name, role) for name, role in roles.items()))
    assert structure.towers == (
        frozenset({"model.visual.patch", "model.visual.blocks.0"}),
        frozenset({"model.audio.layers.0"}),
    )


def test_a_part_has_names_of_its_own():
    """The language model inside of a vision-language model is described as if it stood alone; only its ties remain."""
    model = models.llava()
    inner = next(name for name, module in model.named_modules() if name.endswith("language_model"))
    part, alone = structure_of(model).part(inner, model.get_submodule(inner)), structure_of(model.get_submodule(inner))
    assert [block.name for block in part.blocks] == [block.name for block in alone.blocks]
    assert part.layers == alone.layers and part.parameters == alone.parameters and part.ties == alone.ties


def test_planning_computes_no_structure_again(monkeypatch):
    """Trace, solution, dry runs and another workload all read the structure that came with the case."""
    request = Request(TrainingCase.of(models.llama(), Workload(seq_len=64)), DEVICES)

    def again(*_):
        raise AssertionError("the structure is computed again")

    monkeypatch.setattr(training_case, "structure_of", again)
    assert planner.balanced(request) is not None
    assert planner.balanced(request.with_workload(seq_len=32)) is not None


def test_modules_that_stay_whole_are_part_of_the_key(tmp_path):
    """Results cached for blocks of one size are not used for those of another."""

    def key(no_split):
        case = TrainingCase.of(models.llama(), Workload(), no_split)
        return Request(case, DEVICES, cache=tmp_path).key("profile")

    assert key(None) == key({"LlamaDecoderLayer"}) != key({"LlamaModel"})
