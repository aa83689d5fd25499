"""Blocks that move between four simulated devices in the middle of training: `... RESULT`."""

import copy
import functools

import torch

from balance_shim.placement import move
from tests.placement import move_failures
from tests.placement.moving import (
    FOLDER,
    IDS,
    hooks,
    identities,
    load,
    moves_in_the_middle,
    places,
    same_as_fresh,
    spread,
    train,
)
from tests.simulation.child import main


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
    identities_before = identities(model)
    assert train("llama", model, {1: spread("llama", 1), 2: {**spread("llama", 2), "lm_head": 1}}, base=base) == plain
    assert identities(model).items() >= identities_before.items()
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
    tensors = [rotary.inv_freq, rotary.viewed, rotary.on_host, rotary.other, model.model.steps, model.model.scale]
    assert [str(tensor.device) for tensor in tensors] == ["npu:2", "npu:2", "cpu", "npu:2", "npu:2", "npu:3"]
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
    tensors = [weight, held.code, nested.absmax, weight.SCB, layer.state.CB, layer.state.SCB]
    assert {str(tensor.device) for tensor in tensors} == {"npu:1"}
    assert layer.state.CB.data_ptr() == weight.data_ptr() and layer.state.SCB is weight.SCB


def check_the_trainer_goes_on():
    """A callback moves blocks in the middle, under autocast, which wraps `forward`, with accumulation."""
    import transformers

    class Mover(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
            move.move(model, spread("tied", state.global_step), [optimizer])

    losses = []
    examples = [{"input_ids": ids, "labels": ids} for ids in IDS.reshape(8, 24)]
    for callbacks in ([], [Mover()]):
        settings = transformers.TrainingArguments(
            output_dir=str(FOLDER / "out"), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            logging_steps=1, report_to=[], disable_tqdm=True, seed=3, bf16=True, save_strategy="no",
        )  # fmt: skip
        model = load("tied", spread("tied"))
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=examples, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 3 and losses[0] == losses[1], losses
    assert places(model)["model.embed_tokens.weight"] == "npu:3"


main({**globals(), **vars(move_failures)})
