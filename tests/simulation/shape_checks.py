"""Tensors on two simulated devices that have shapes but no numbers, far larger than this machine's memory."""

import io

import torch
from torch.nn.functional import scaled_dot_product_attention

from balance_shim import simulation
from balance_shim.units import GIB
from tests.simulation.child import main, most_resident

simulation.install(simulation.parse_spec("2x900GiB:shapes"))


def check_big_tensors_cost_nothing_and_are_counted():
    before = most_resident()
    x = torch.ones(200, GIB // 4, device="npu:1")
    y = (x * 2).to("npu:0")
    assert [device.live for device in simulation.usage()] == [200 * GIB, 200 * GIB]
    assert y.shape == x.shape and most_resident() - before < GIB // 4
    try:
        torch.cat([x, x, x, x])
        raise AssertionError("800 GiB beside 200 in 900")
    except torch.OutOfMemoryError as error:
        assert "Tried to allocate 800.0 GiB" in str(error)


def check_big_factories_cost_the_host_nothing():
    before = most_resident()
    made = torch.zeros(GIB // 4, device="npu:0"), torch.rand(GIB // 4, device="npu:1")
    assert [device.live for device in simulation.usage()] == [GIB, GIB]
    assert most_resident() - before < GIB // 4 and all(tensor.device.type == "npu" for tensor in made)


def check_whole_numbers_stay_real():
    ids = torch.tensor([[5, 7, 0], [1, 2, 3]]).to("npu:1")
    mask = ids > 0
    assert ids.tolist() == [[5, 7, 0], [1, 2, 3]] and ids.max().item() == 7 and not mask.all()
    assert mask.nonzero().shape == (5, 2) and ids[mask].tolist() == [5, 7, 1, 2, 3]
    assert torch.arange(4, device="npu:1").cumsum(0).tolist() == [0, 1, 3, 6]


def check_numbers_that_depend_on_no_unknown_ones_are_real():
    """Whole numbers filled in after the shape of a floating-point tensor, and what is so made on the host."""
    x = torch.randn(2, 3, device="npu:1")
    for made, expected in (
        (x.new_ones(2, dtype=torch.long), [1, 1]),
        (x.new_full((2,), 7, dtype=torch.int), [7, 7]),
        (torch.full_like(x, 4, dtype=torch.long), [[4] * 3] * 2),
        (torch.ones_like(x, dtype=torch.bool).all(), True),
        (x.new_tensor([1, 2], dtype=torch.long), [1, 2]),
        (torch.linspace(0, 4, 3, dtype=torch.long, device="npu:1"), [0, 2, 4]),
    ):
        assert made.device == x.device and made.tolist() == expected
    assert torch.zeros_like(x.t(), dtype=torch.long).stride() == (1, 3)
    assert x.new_ones(2, device="cpu").tolist() == [1, 1] and torch.ones_like(x).raw.is_meta


def check_floating_point_numbers_get_plausible_answers():
    x = torch.randn(10, 10, device="npu:1")
    loss = (x @ x).mean()
    assert loss.item() == 1.0 and not torch.isnan(loss).any() and x.argmax().item() == 0
    assert (x > 0).nonzero().shape == (100, 2) and x[(x > 0)[0]].shape == (10, 10)
    assert x.tolist() == [[0.0] * 10] * 10 and x.cpu().shape == (10, 10)


def check_what_an_unknown_number_is_written_to_is_unknown():
    count = torch.zeros((), device="npu:1")
    count += 1
    assert count.item() == 1, "a single number is known"
    ids = torch.zeros(4, dtype=torch.int64, device="npu:1")
    ids.copy_(torch.randn(4, device="npu:1"))
    assert ids.shape == (4,) and ids.sum().item() == 0


def check_training_step():
    model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 50))
    model.to("npu:1")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, 50, (4, 8)).to("npu:1")
    scaler = torch.npu.amp.GradScaler()
    with torch.autocast("npu", dtype=torch.float16):
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert all(weight.grad.shape == weight.shape for weight in model.parameters())


def check_attention_keeps_no_square():
    query = torch.randn(1, 4, 8192, 16, device="npu:0", requires_grad=True)
    simulation.reset_peaks()
    start = simulation.usage()[0].live
    scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    assert query.grad.shape == query.shape
    assert simulation.usage()[0].peak - start < 4 * 8192 * 8192


def check_files_have_shapes_and_no_two_tensors_look_shared():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).to("npu:1")
    places = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert len(places) == 4 and 0 not in places
    assert model[0].weight.view(-1).untyped_storage().data_ptr() == model[0].weight.untyped_storage().data_ptr()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["0.weight"].shape == (64, 64)


def check_kernels_get_no_address_of_what_has_no_values():
    """Libraries that look for equal tensors get one, by name of their package; others an error, not a host address."""
    x = torch.randn(4, 4, device="npu:1")
    for name, allowed in (
        ("safetensors.torch", True),
        ("transformers.modeling_utils", True),
        ("accelerate.hooks", True),
        ("triton.runtime.jit", False),
        ("torch._inductor.runtime.triton_heuristics", False),
        ("bitsandbytes.functional", False),
        ("__main__", False),
    ):
        names = {"__name__": name, "x": x}
        try:
            exec("address = x.data_ptr()", names)
            assert allowed and names["address"], name
        except RuntimeError as error:
            assert not allowed and "no address" in str(error) and name in str(error), (name, error)
    assert torch.arange(3, device="npu:1").data_ptr(), "whole numbers have values here"


def check_products_of_groups():
    tokens, experts = torch.randn(10, 4, device="npu:1"), torch.randn(3, 4, 6, device="npu:1")
    ends = torch.tensor([2, 5, 10], dtype=torch.int32, device="npu:1")
    assert torch._grouped_mm(tokens, experts, offs=ends).shape == (10, 6)
    assert torch._grouped_mm(tokens.t(), torch.randn(10, 6, device="npu:1"), offs=ends).shape == (3, 4, 6)


main(globals())
