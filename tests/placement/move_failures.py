"""Checks of moves that fail, run out of memory, are interrupted or refused; move_checks.py runs them with its own."""

import functools

import torch

from balance_shim import simulation
from balance_shim.placement import movable_pieces, move
from balance_shim.units import MIB
from tests.placement.moving import (
    identities,
    inputs,
    live,
    load,
    places,
    refused,
    same_as_fresh,
    spread,
    state,
    train,
)


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
        identities_before = identities(model)
        ballast = [
            torch.empty(torch.npu.mem_get_info(place)[0] - slack, dtype=torch.uint8, device=f"npu:{place}")
            for place in range(4)
        ]
        swapped = {name: {0: 0, 1: 2, 2: 1, 3: 3}[place] for name, place in spread("llama").items()}
        moved = move.move(model, swapped)
        assert (moved.over_host > 0) == over_host, moved
        assert identities(model) == identities_before
        del ballast
        assert model(**inputs("llama", 0)).loss.item() == plain
        same_as_fresh("llama", model, swapped)


def check_no_device_holds_more_on_the_way_than_at_its_ends():
    """But for one tensor; also where there is room for everything at once."""
    model = load("llama", spread("llama"))
    before = live()
    simulation.reset_peaks()
    move.move(model, {name: {0: 1, 1: 2, 2: 0, 3: 3}[place] for name, place in spread("llama").items()})
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
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
