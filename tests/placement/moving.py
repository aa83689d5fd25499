"""Small models on four simulated devices, moved in the middle of a training, and what can be compared of them."""

import functools
import gc
import os
import tempfile
from pathlib import Path

import torch

from balance_shim import simulation

# To the byte: the order in which blocks move is what counts here, not what an allocator's segments leave unused.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
simulation.install(simulation.parse_spec("4x64MiB"))

import transformers  # noqa: E402 - as in a script, where the simulation is there before anything else
from accelerate.hooks import AlignDevicesHook  # noqa: E402

from balance_shim.memory.blocks import chain  # noqa: E402
from balance_shim.placement import move  # noqa: E402
from tests import models  # noqa: E402

transformers.logging.set_verbosity_error()
FOLDER = Path(tempfile.mkdtemp())
IDS = torch.randint(1, 500, (4, 2, 24), generator=torch.Generator().manual_seed(7))


@functools.cache
def saved(kind):
    """Write a small model with weights and return its class, its folder and the names of its blocks in order."""
    torch.manual_seed(0)
    model_class, config = {
        "llama": lambda: (transformers.LlamaForCausalLM, models.llama().config),
        "tied": lambda: (transformers.LlamaForCausalLM, models.llama(tie_word_embeddings=True).config),
        "gpt2": lambda: (transformers.GPT2LMHeadModel, models.gpt2().config),
        "llava": lambda: (transformers.LlavaForConditionalGeneration, models.llava().config),
    }[kind]()
    if kind == "llava":
        config.image_token_index = config.image_token_id = 511
        config.image_seq_length = 4
    model = model_class(config)
    model.save_pretrained(FOLDER / kind)
    return model_class, FOLDER / kind, tuple(block.name for block in chain(model))


def spread(kind, turn=0):
    """Return a map of all four devices: consecutive blocks, the first of them on device `turn`."""
    blocks = saved(kind)[2]
    device_map = {name: (place * 4 // len(blocks) + turn) % 4 for place, name in enumerate(blocks)}
    if kind in ("tied", "gpt2"):
        device_map["lm_head"] = device_map[blocks[0]]
    if kind == "llava":  # 4.45 needs these where the inputs arrive, which old accelerate takes from the first entry
        fixed = {name: 0 for name in blocks if name.endswith("embed_tokens") or "projector" in name}
        device_map = {**fixed, **device_map, **fixed}
    return device_map


def load(kind, device_map):
    return saved(kind)[0].from_pretrained(saved(kind)[1], device_map=dict(device_map))


def inputs(kind, step):
    ids = IDS[step].clone()
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind == "llava":
        ids[:, 2:6] = 511  # four patches
        batch["pixel_values"] = torch.rand((2, 3, 28, 28), generator=torch.Generator().manual_seed(step))
    return {name: tensor.to("npu:0") for name, tensor in batch.items()}


def train(kind, model, moves=None, steps=4, base=None, rate=1e-2):
    """Return the losses; `moves` maps a step to the map that comes into force between its backward pass and step()."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        outputs = model(**inputs(kind, step))
        assert outputs.logits.device == torch.device("npu:0"), "outputs return to the first device"
        outputs.loss.backward()
        losses.append(outputs.loss.item())
        del outputs
        if moves and step in moves:
            move.move(base or model, moves[step], [optimizer])
        optimizer.step()
        optimizer.zero_grad()
    return losses


def identities(model):
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    by_name = {name: id(tensor) for name, tensor in tensors}
    return by_name | {f"{name}.grad": id(tensor.grad) for name, tensor in tensors if tensor.grad is not None}


def places(model):
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: str(tensor.device) for name, tensor in tensors}


def hooks(model):
    """Return the hooks of each module that does something with weights, in what counts of them."""
    placed = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hook = vars(module).get("_hf_hook")
        idle = isinstance(module, torch.nn.ModuleList) or not list(module.parameters())
        if isinstance(hook, AlignDevicesHook) and not idle:
            placed[name] = (hook.execution_device, hook.io_same_device, hook.skip_keys, "_old_forward" in vars(module))
    return placed


def live():
    gc.collect()
    return [device.live for device in simulation.usage()]


def difference(more, less):
    return [one - other for one, other in zip(more, less, strict=True)]


def state(model):
    return places(model), hooks(model), dict(model.hf_device_map), identities(model)


def same_as_fresh(kind, model, device_map):
    """Check that `model` is in every way one that was loaded with `device_map`, but for the bytes."""
    assert model.hf_device_map == device_map
    model.zero_grad()
    fresh = load(kind, device_map)
    assert places(model) == places(fresh)
    model_hooks, fresh_hooks = hooks(model), hooks(fresh)
    if model_hooks:
        assert model_hooks.pop("")[:2] == (0, True) and fresh_hooks.pop("")[1], "older accelerate takes any device"
    assert model_hooks == fresh_hooks, [
        (name, model_hooks.get(name), fresh_hooks.get(name))
        for name in {*model_hooks, *fresh_hooks}
        if model_hooks.get(name) != fresh_hooks.get(name)
    ]


def refused(function, *phrases, reason=move.MoveError):
    try:
        function()
    except reason as error:
        assert all(phrase in str(error) for phrase in phrases), error
        return error
    raise AssertionError("nothing was raised")


def moves_in_the_middle(kind, first, second):
    plain = train(kind, load(kind, first))
    nothing = live()
    model = load(kind, first)
    before, held = identities(model), getattr(model, "hf_device_map", None)
    losses = train(kind, model, {1: second})
    assert losses == plain and plain[0] != plain[-1], (losses, plain)
    assert identities(model).items() >= before.items()
    assert held is None or model.hf_device_map is held
    same_as_fresh(kind, model, second)
    bytes_of_model = difference(live(), nothing)
    del model
    assert live() == nothing
    fresh = load(kind, second)
    assert difference(live(), nothing) == bytes_of_model, fresh
