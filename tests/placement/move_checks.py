"""Blocks that move between four simulated devices in the middle of training: `... RESULT`."""

import copy
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
from balance_shim.placement import movable_pieces, move  # noqa: E402
from balance_shim.units import MIB  # noqa: E402
from tests import models  # noqa: E402
from tests.simulation.child import main  # noqa: E402

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
    found = {name: id(tensor) for name, tensor in tensors}
    return found | {f"{name}.grad": id(tensor.grad) for name, tensor in tensors if tensor.grad is not None}


def places(model):
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: str(tensor.device) for name, tensor in tensors}


def hooks(model):
    """Return the hooks of each module that does something with weights, in what counts of them."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hook = vars(module).get("_hf_hook")
        idle = isinstance(module, torch.nn.ModuleList) or not list(module.parameters())
        if isinstance(hook, AlignDevicesHook) and not idle:
            found[name] = (hook.execution_device, hook.io_same_device, hook.skip_keys, "_old_forward" in vars(module))
    return found


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
    mine, theirs = hooks(model), hooks(fresh)
    if mine:
        assert mine.pop("")[:2] == (0, True) and theirs.pop("")[1], "older accelerate takes any device"
    assert mine == theirs, [
        (name, mine.get(name), theirs.get(name)) for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)
    ]


def refused(function, *words, reason=move.MoveError):
    try:
        function()
    except reason as error:
        assert all(word in str(error) for word in words), error
        return error
    raise AssertionError("nothing was raised")


def moves_in_the_middle(kind, first, second):
    plain = train(kind, load(kind, first))
    nothing = live()
    model = load(kind, first)
    known, held = identities(model), getattr(model, "hf_device_map", None)
    losses = train(kind, model, {1: second})
    assert losses == plain and plain[0] != plain[-1], (losses, plain)
    assert identities(model).items() >= known.items()
    assert held is None or model.hf_device_map is held
    same_as_fresh(kind, model, second)
    bytes_of_model = difference(live(), nothing)
    del model
    assert live() == nothing
    fresh = load(kind, second)
    assert difference(live(), nothing) == bytes_of_model, fresh


def check_training_goes_on_as_if_nothing_had_moved():
    moves_in_the_middle("llama", spread("llama"), spread("llama", 1))


def check_tied_weights_stay_tied():
    for kind in ("tied", "gpt2"):
        moves_in_the_middle(kind, spread(kind), spread(kind, 2))
    for kind in ("tied", "gpt2"):
        model = load(kind, spread(kind))
        move.move(model, spread(kind, 1))
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def check_a_vision_language_model():
    moves_in_the_middle("llava", spread("llava"), spread("llava", 3))


def check_maps_of_coarser_and_finer_names():
    coarse = {"model": 0, "lm_head": 3}
    moves_in_the_middle("llama", coarse, spread("llama", 1))
    moves_in_the_middle("llama", spread("llama"), coarse)
    # Of names within names accelerate makes hooks that do not work; ours do.
    model = load("llama", coarse)
    plain = train("llama", load("llama", coarse))
    assert train("llama", model, {1: {"model": 2, "model.layers.1": 1, "lm_head": 0}}) == plain
    assert train("llama", load("llama", coarse), {1: {"": 2, "model.layers.1": 1, "lm_head": 0}}) == plain


def check_one_device_to_several_and_back():
    moves_in_the_middle("tied", {"": 0}, spread("tied", 1))
    model = load("llama", {"": 0})
    torch.manual_seed(0)
    plain = train("llama", copy.deepcopy(model))
    losses = train("llama", model, {0: spread("llama"), 1: spread("llama", 2), 2: {"": 0}})
    assert losses == plain
    assert not hooks(model) and "to" not in vars(model)
    same_as_fresh("llama", model, {"": 0})
    move.move(model, {"": 3})
    assert set(places(model).values()) == {"npu:3"} and model.hf_device_map == {"": 3} and not hooks(model)


def check_gradient_checkpointing_and_hooks_of_others():
    for reentrant in (True, False):
        results = []
        for moves in (None, {0: spread("llama", 1), 2: spread("llama", 3)}):
            model = load("llama", spread("llama"))
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            calls = []
            model.model.layers[2].register_forward_hook(lambda *_, calls=calls: calls.append("forward"))
            weight = model.model.layers[2].mlp.up_proj.weight
            weight.register_hook(lambda gradient, calls=calls: calls.append("gradient"))
            results.append((train("llama", model, moves), calls.count("forward") > 3, calls.count("gradient")))
        assert results[0] == results[1] and results[0][1:] == (True, 4), results


def check_what_others_put_around_forward_stays():
    seen = []

    def wrapped(original):
        @functools.wraps(original)
        def forward(*args, **kwargs):
            seen.append(1)
            return original(*args, **kwargs)

        return forward

    model = load("llama", spread("llama"))
    for module in (model, model.model.layers[3]):
        module.forward = wrapped(module.forward)
    plain = train("llama", load("llama", spread("llama")))
    assert train("llama", model, {0: spread("llama", 1), 1: {"": 0}, 2: spread("llama", 2)}) == plain
    assert len(seen) == 8
    assert model.model.layers[3]._hf_hook.hooks[0].execution_device == spread("llama", 2)["model.layers.3"]


def adapted(base, **more):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    options = {"modules_to_save": ["lm_head"], **more}
    config = LoraConfig(
        r=4,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "up_proj", *options.pop("also", ())],
        lora_dropout=0.0,
        **options,
    )
    return get_peft_model(base, config)


def check_adapters_move_with_their_layers():
    plain = train("llama", adapted(load("llama", spread("llama"))))
    base = load("llama", spread("llama"))
    model = adapted(base)
    known = identities(model)
    assert train("llama", model, {1: spread("llama", 1), 2: {**spread("llama", 2), "lm_head": 1}}, base=base) == plain
    assert identities(model).items() >= known.items()
    for name, place in places(base).items():
        layer = name.split(".layers.")[-1].split(".")[0]
        if layer.isdigit():
            assert place == f"npu:{base.hf_device_map[f'model.layers.{layer}']}", name
    model.zero_grad()
    model = model.merge_and_unload()
    assert set(places(model.lm_head).values()) == {"npu:1"}


def check_adapters_of_embedding_and_head():
    """These may part from their neighbours, so what PEFT has put around them must send its inputs after them."""
    several = {**spread("llama", 2), "model.embed_tokens": 3, "lm_head": 0}
    options = {"modules_to_save": None, "also": ("embed_tokens", "lm_head")}
    plain = train("llama", adapted(load("llama", {"": 0}), **options))
    for first in ({"": 0}, {**spread("llama"), "lm_head": 2}):  # apart from the norm it would fail before any move
        base = load("llama", first)
        assert train("llama", adapted(base, **options), {1: several}, base=base) == plain


def check_adapters_made_on_one_device_are_spread():
    plain = train("llama", adapted(load("llama", {"": 0})))
    base = load("llama", {"": 0})
    assert train("llama", adapted(base), {1: spread("llama", 1), 2: {"": 0}}, base=base) == plain


def check_buffers_and_plain_tensors_of_split_modules():
    model = load("llama", spread("llama"))
    rotary = model.model.rotary_emb
    rotary.kept = rotary.inv_freq
    rotary.viewed = rotary.inv_freq.view(-1)
    rotary.on_host = torch.ones(3)
    rotary.other = torch.ones(3, device="npu:3")
    model.model.register_buffer("steps", torch.zeros(1, device="npu:0"), persistent=False)
    model.model.scale = torch.nn.Parameter(torch.ones(5, device="npu:0"))
    move.move(model, {**spread("llama", 1), "model.steps": 2, "model.scale": 3, "model.rotary_emb": 2})
    assert rotary.kept is rotary.inv_freq and rotary.viewed.data_ptr() == rotary.inv_freq.data_ptr()
    found = [rotary.inv_freq, rotary.viewed, rotary.on_host, rotary.other, model.model.steps, model.model.scale]
    assert [str(tensor.device) for tensor in found] == ["npu:2", "npu:2", "cpu", "npu:2", "npu:2", "npu:3"]
    assert "steps" in model.model._non_persistent_buffers_set


class State:
    """As the state of a quantized weight: tensors in an object that several hold."""

    def __init__(self, **tensors):
        vars(self).update(tensors)


def check_the_state_of_quantized_weights_moves_along():
    model = load("llama", spread("llama"))
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.weight = torch.nn.Parameter(torch.ones(8, dtype=torch.uint8, device="npu:0"), requires_grad=False)
    nested = State(absmax=torch.ones(2, device="npu:0"), blocksize=64)
    weight.quant_state = layer.quant_state = State(code=torch.ones(4, device="npu:0"), state2=nested)
    weight.SCB = torch.ones(2, device="npu:0")
    layer.state = State(CB=weight.data, SCB=weight.SCB, threshold=6.0)
    held = layer.quant_state
    move.move(model, spread("llama", 1))
    assert layer.quant_state is held is layer.weight.quant_state and layer.weight is weight
    found = [weight, held.code, nested.absmax, weight.SCB, layer.state.CB, layer.state.SCB]
    assert {str(tensor.device) for tensor in found} == {"npu:1"}
    assert layer.state.CB.data_ptr() == weight.data_ptr() and layer.state.SCB is weight.SCB


def failing_at(owner, name, position, error):
    """Return a patch of `owner.name` that raises `error` at call number `position`, half-way through."""
    original = getattr(owner, name)
    count = iter(range(1 << 30))

    def patched(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(count) == position:
            raise error
        return result

    return functools.partial(setattr, owner, name, patched), functools.partial(setattr, owner, name, original)


def check_a_failure_half_way_leaves_the_old_map_working():
    """At several tensors, at the hooks, and at the map; with ties, adapters of others and gradients."""
    from balance_shim.placement import align_hooks

    plain = train("tied", load("tied", spread("tied")), steps=2)
    cases = [(movable_pieces.Piece, "put", position) for position in (0, 1, 7, 40)]
    cases += [(align_hooks, "align", 0), (move, "_note_map", 0), (align_hooks, "renew_tied_addresses", 0)]
    for first, second in ((spread("tied"), spread("tied", 1)), ({"": 0}, spread("tied", 1)), (spread("tied"), {"": 0})):
        for owner, name, position in cases:
            assert fails(owner, name, position, first, second) == plain, (name, position)


def fails(owner, name, position, first, second):
    """Return the losses of a training in which a move failed once, and then did not."""
    model = load("tied", first)
    if not hasattr(model, "hf_device_map"):
        model.hf_device_map = dict(first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(2):
        loss = model(**inputs("tied", step)).loss
        loss.backward()
        losses.append(loss.item())
        del loss
        if step == 0:
            before, bytes_before = state(model), live()
            error = torch.OutOfMemoryError("injected\nand more")
            patch, restore = failing_at(owner, name, position, error)
            patch()
            try:
                raised = refused(lambda: move.move(model, second, [optimizer]), "OutOfMemoryError: injected")
            finally:
                restore()
            assert raised.__cause__ is error and "stays as it was" in str(raised)
            assert state(model) == before and live() == bytes_before, (name, position)
        optimizer.step()
        optimizer.zero_grad()
    move.move(model, second, [optimizer])
    model(**inputs("tied", 0)).loss.backward()
    return losses


def check_an_interruption_stays_one():
    model = load("llama", spread("llama"))
    before = state(model)
    patch, restore = failing_at(movable_pieces.Piece, "put", 5, KeyboardInterrupt())
    patch()
    try:
        refused(lambda: move.move(model, spread("llama", 1)), reason=KeyboardInterrupt)
    finally:
        restore()
    assert state(model) == before


def check_a_way_back_that_fails_is_said():
    model = load("llama", spread("llama"))
    original = movable_pieces.Piece.put
    calls = iter(range(1 << 30))

    def put(piece, device):
        if next(calls) >= 5:
            raise torch.OutOfMemoryError("full")
        original(piece, device)

    movable_pieces.Piece.put = put
    try:
        refused(lambda: move.move(model, spread("llama", 1)), "so did moving them back", reason=move.LostModelError)
    finally:
        movable_pieces.Piece.put = original


def check_memory_that_runs_out():
    """Known beforehand, nothing is touched; if it shows on the way, everything goes back."""
    model = load("llama", spread("llama"))
    before, second = state(model), dict.fromkeys(spread("llama"), 3)
    ballast = torch.empty(torch.npu.mem_get_info(3)[0] - MIB // 4, dtype=torch.uint8, device="npu:3")
    refused(lambda: move.move(model, second), "more than npu:3 has free")
    assert state(model) == before
    original, move._free_bytes = move._free_bytes, lambda device: move.UNKNOWN
    try:
        refused(lambda: move.move(model, second), "OutOfMemoryError: Simulated device out of memory")
    finally:
        move._free_bytes = original
    assert state(model) == before
    del ballast
    move.move(model, second)
    assert set(places(model).values()) == {"npu:3"}


def check_full_devices_exchange_blocks():
    """Where both are full, and the order decides: nothing runs out, and the host helps only if it must."""
    for slack, over_host in ((MIB // 4, False), (4096, True)):
        model = load("llama", spread("llama"))
        plain = model(**inputs("llama", 0)).loss.item()
        known = identities(model)
        ballast = [
            torch.empty(torch.npu.mem_get_info(place)[0] - slack, dtype=torch.uint8, device=f"npu:{place}")
            for place in range(4)
        ]
        swapped = {name: {0: 0, 1: 2, 2: 1, 3: 3}[place] for name, place in spread("llama").items()}
        moved = move.move(model, swapped)
        assert (moved.over_host > 0) == over_host, moved
        assert identities(model) == known
        del ballast
        assert model(**inputs("llama", 0)).loss.item() == plain
        same_as_fresh("llama", model, swapped)


def check_no_device_holds_more_on_the_way_than_at_its_ends():
    """But for one tensor; also where there is room for everything at once."""
    model = load("llama", spread("llama"))
    before = live()
    simulation.reset_peaks()
    move.move(model, {name: {0: 1, 1: 2, 2: 0, 3: 3}[place] for name, place in spread("llama").items()})
    largest = max(each.numel() * each.element_size() for each in model.parameters())
    for device, start, end in zip(simulation.usage(), before, live(), strict=True):
        assert device.peak <= max(start, end) + largest, (device, start, end, largest)


def check_nothing_to_do_costs_nothing_and_only_changes_are_touched():
    model = load("llama", spread("llama"))
    patch, restore = failing_at(movable_pieces.Piece, "put", 0, AssertionError("touched"))
    patch()
    try:
        assert move.move(model, spread("llama")) == move.Moved()
        assert move.move(model, model.hf_device_map) == move.Moved()
    finally:
        restore()
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    moved = move.move(model, {**spread("llama"), "model.layers.0": 3})
    inside = [*model.model.layers[0].parameters(), *model.model.layers[0].buffers()]
    assert moved == move.Moved(("model.layers.0",), len(inside), sum(tensor.numel() * 4 for tensor in inside))
    changed = {name for name, parameter in model.named_parameters() if parameter.data_ptr() != weights[name]}
    assert changed == {name for name in weights if name.startswith("model.layers.0.")}


def check_addresses_of_tied_weights_are_renewed():
    model = load("tied", spread("tied"))
    move.move(model, spread("tied", 1))
    assert model._hf_hook.tied_params_map == {model.lm_head.weight.data_ptr(): {}}


def check_what_cannot_be_moved_is_refused():
    model = load("tied", spread("tied"))
    before = state(model)
    good = spread("tied", 1)
    refused(lambda: move.move(model, {**good, "lm_head": 0}), "one tensor", "two devices")
    refused(lambda: move.move(model, {**good, "model.norm": "cpu"}), "between accelerators only")
    refused(lambda: move.move(model, {**good, "model.norm": 4}), "no such device")
    refused(lambda: move.move(model, {"model.norm": 1}), "no device for model.embed_tokens.weight")
    assert state(model) == before
    refused(lambda: move.move(torch.nn.ModuleDict({"around": model}), good), "no device for around.model")

    model = load("llama", spread("llama"))
    model.model.layers[1].self_attn._hf_hook.offload = True
    refused(lambda: move.move(model, spread("llama", 1)), "model.layers.1.self_attn: its weights are offloaded")
    model = load("llama", spread("llama"))
    model.model.layers[1].mlp.q_handle = 17
    refused(lambda: move.move(model, spread("llama", 1)), "by their address")
    model = load("llama", spread("llama"))
    from torch.testing._internal.two_tensor import TwoTensor

    model.model.norm.weight = torch.nn.Parameter(TwoTensor(torch.ones(64), torch.ones(64)))
    refused(lambda: move.move(model, spread("llama", 1)), "model.norm: weight is a TwoTensor")


def check_the_trainer_goes_on():
    """A callback moves blocks in the middle, under autocast, which wraps `forward`, with accumulation."""

    class Mover(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
            move.move(model, spread("tied", state.global_step), [optimizer])

    found = []
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.reshape(8, 24)]
    for callbacks in ([], [Mover()]):
        settings = transformers.TrainingArguments(
            output_dir=str(FOLDER / "out"), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            logging_steps=1, report_to=[], disable_tqdm=True, seed=3, bf16=True, save_strategy="no",
        )  # fmt: skip
        model = load("tied", spread("tied"))
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        found.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(found[0]) == 3 and found[0] == found[1], found
    assert places(model)["model.embed_tokens.weight"] == "npu:3"


main(globals())
