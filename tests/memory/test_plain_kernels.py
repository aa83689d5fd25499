"""Models with kernels in the place of their code: they are traced as if they had none."""

import sys
from dataclasses import replace
from types import MethodType, ModuleType

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from balance_shim.memory.blocks import Block
from balance_shim.memory.estimate import activations
from balance_shim.memory.workload import Workload
from tests import models
from tests.memory.traced_costs import WORKLOAD, profiled

KERNELS = """
import torch


def refuse(*args, **kwargs):
    raise RuntimeError("0 active drivers ([]). There should only be one.")


def lce_forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
    return refuse()


def liger_rotary_pos_emb(*args, **kwargs):
    return refuse()


class LigerRMSNorm(torch.nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, hidden_states):
        return refuse()


class LigerSwiGLUMLP(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate_proj = torch.nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = torch.nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = torch.nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return refuse()
"""


@pytest.fixture
def liger(monkeypatch):
    """Stand in for liger_kernel, whose Triton kernels need a GPU; its way of patching is Liger 0.8's."""
    module = ModuleType("liger_kernel.stand_in")
    exec(KERNELS, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def tiny():
    config = transformers.LlamaConfig(**models.SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    return models.on_meta(transformers.LlamaForCausalLM, config)


FUSED = replace(WORKLOAD, loss="chunked")


def same_as_plain(model, workload):
    """Whether `model` costs what it does without kernels under `workload`."""
    fused, plain = profiled(model, workload)[1], profiled(tiny(), FUSED)[1]
    assert fused.method == "traced", fused.method
    return fused.costs == plain.costs


def test_kernels_bound_to_an_instance(liger, monkeypatch):
    """Liger in `Trainer.__init__`: bound methods, a function of the module, head and loss in one."""
    model = tiny()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", liger.liger_rotary_pos_emb)
    model.forward = MethodType(liger.lce_forward, model)
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(liger.LigerSwiGLUMLP.forward, layer.mlp)
        layer.input_layernorm.forward = MethodType(liger.LigerRMSNorm.forward, layer.input_layernorm)
    assert same_as_plain(model, WORKLOAD) and same_as_plain(model, FUSED)
    assert modeling_llama.apply_rotary_pos_emb is liger.liger_rotary_pos_emb
    assert model.forward.__func__ is liger.lce_forward


def test_kernels_in_the_place_of_classes(liger, monkeypatch):
    """Liger before the model is made: classes of the module, and the forward of the model's class."""
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", liger.LigerRMSNorm)
    monkeypatch.setattr(modeling_llama, "LlamaMLP", liger.LigerSwiGLUMLP)
    model = tiny()
    assert type(model.model.norm) is liger.LigerRMSNorm
    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "forward", liger.lce_forward)
        blocks, fused = profiled(model, WORKLOAD)
    monkeypatch.undo()
    assert fused.method == "traced", fused.method
    plain = profiled(tiny(), FUSED)[1]
    layers = [position for position, block in enumerate(blocks) if block.role == "layer"]
    assert [_unnumbered(fused.costs[index]) for index in layers] == [
        _unnumbered(plain.costs[index]) for index in layers
    ]


def _unnumbered(cost):
    """Return a cost without the numbers of the tensors that it takes: another trace may have more of them."""
    return replace(cost, takes=tuple(size for _, size in cost.takes))


def test_functions_that_packages_replace(monkeypatch):
    """The decorated function runs, not the one that transformers found in a package; unknown arguments are left out."""
    from balance_shim.memory.tracing import plain_kernels

    home = ModuleType("modeling_stand_in")
    text = "def wrapped(*args, **kwargs):\n    raise RuntimeError('no driver')\n"
    namespace = {"__name__": "transformers.integrations.hub_kernels"}
    exec(compile(text, "site-packages/transformers/integrations/hub_kernels.py", "exec"), namespace)
    chosen = namespace["wrapped"]
    chosen.__wrapped__ = lambda x, scale=2: x * scale
    home.scan = chosen
    made = plain_kernels._plain_function(home, "scan", chosen)
    assert made(3, scale=4, cu_seqlens=None) == 12
    assert plain_kernels._plain_function(home, "other", test_functions_that_packages_replace) is None


def test_the_formula_knows_the_hidden_size_of_grouped_queries():
    """Keys of 64 values beside a hidden size of 512: what a layer keeps with checkpointing is its input."""
    shapes = [(512, 512), (64, 512), (64, 512), (512, 512), (1408, 512), (1408, 512), (512, 1408)]
    block = Block(name="model.layers.0", kind="LlamaDecoderLayer", role="layer", parameters=(), buffers=())
    matrices = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    workload = Workload(batch_size=1, seq_len=100, gradient_checkpointing=True)
    assert activations(block, matrices, workload).kept == 100 * 512 * 2
