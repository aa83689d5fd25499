"""Tensors on three simulated devices, with real numbers."""

import copy
import io
import threading

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from balance_shim import simulation
from balance_shim.units import MIB
from tests.simulation.child import main

simulation.install(simulation.parse_spec("3x64MiB"))


def live(index):
    return simulation.usage()[index].live


def raises(error, act):
    """Return the message of the exception of exactly this type that `act` raises."""
    try:
        act()
    except error as failure:
        assert type(failure) is error, type(failure)
        return str(failure)
    raise AssertionError(f"no {error.__name__}")


def same(simulated, plain, tolerance=1e-6):
    assert simulated.device.type == "npu" and plain.device.type == "cpu"
    assert simulated.shape == plain.shape and simulated.dtype == plain.dtype
    torch.testing.assert_close(simulated.cpu(), plain, rtol=tolerance, atol=tolerance)


def check_factories():
    same(torch.arange(2, 8, 2, device="npu:1"), torch.arange(2, 8, 2))
    same(torch.full((2, 3), 1.5, device="npu:1"), torch.full((2, 3), 1.5))
    same(torch.tensor([[1, 2], [3, 4]], device="npu:2"), torch.tensor([[1, 2], [3, 4]]))
    same(torch.eye(3, device="npu:0"), torch.eye(3))
    same(torch.linspace(0, 1, 5, device=2), torch.linspace(0, 1, 5))
    one, two = torch.ones((), device="npu:0"), torch.tensor(2.0, device="npu:0")
    same(torch.tensor([one, two], device="npu:0"), torch.tensor([1.0, 2.0]))


def check_numbers_come_back():
    x = torch.arange(6.0, device="npu:1").view(2, 3)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]] and x[1, 2].item() == 5 and f"{x[1, 2]:.1f}" == "5.0"
    assert "npu:1" in repr(x) and "npu:1" in raises(TypeError, x.numpy) and x.cpu().numpy().sum() == 15


def check_tensors_on_different_devices_are_refused():
    first, second = torch.ones(3, device="npu:0"), torch.ones(3, device="npu:1")
    wrong = [
        lambda: first + second,
        lambda: first.sum() / second.sum(),  # without dimensions, but on devices: the bug of TRL 1.16
        lambda: first + torch.ones(3),
        lambda: torch.cat([first, second]),
        lambda: first.add_(second),
        lambda: torch.where(first > 0, first, second),
        lambda: scaled_dot_product_attention(*(torch.ones(1, 1, 2, 2, device=f"npu:{i}") for i in (0, 0, 1))),
    ]
    for act in wrong:
        message = raises(RuntimeError, act)
        assert message.startswith("Expected all tensors to be on the same device") and "npu:0" in message, message


def check_host_numbers_and_indices_are_taken():
    x = torch.arange(4.0, device="npu:1")
    same(x * torch.tensor(2.0), torch.arange(4.0) * 2)
    same(x[torch.tensor([1, 3])], torch.tensor([1.0, 3.0]))


def check_bytes_are_rounded_counted_once_and_freed():
    start = live(1)
    x = torch.ones(1, device="npu:1")
    assert live(1) - start == 512
    y = torch.ones(1000, device="npu:1")
    views = [y[10:20], y.view(10, 100), y.detach(), y.t() if y.dim() == 2 else y.unsqueeze(0)]
    assert live(1) - start == 512 + 4096
    del y
    assert live(1) - start == 512 + 4096, "views keep their storage"
    del views, x
    assert live(1) == start


def check_copies_count_on_the_target():
    start = [live(0), live(2)]
    x = torch.ones(MIB // 4, device="npu:0")
    y = x.to("npu:2")
    assert [live(0), live(2)] == [start[0] + MIB, start[1] + MIB]
    assert x.to("npu:0") is x
    y.copy_(torch.zeros(MIB // 4))
    assert y.sum() == 0 and x.sum() == MIB // 4


def check_operations_in_place_follow_shape_and_bytes():
    start = live(0)
    x = torch.arange(6.0, device="npu:0").view(2, 3)
    x.t_()
    assert x.shape == (3, 2) and x.stride() == (1, 3) and x[0].tolist() == [0, 3]
    x.unsqueeze_(0)
    assert x.shape == (1, 3, 2)
    x.resize_(1000, 10)
    assert x.shape == (1000, 10) and live(0) - start == 40448
    out = torch.empty(0, device="npu:0")
    assert torch.add(torch.ones(3, device="npu:0"), 1, out=out) is out and out.tolist() == [2, 2, 2]
    part = torch.zeros(10, device="npu:0")
    view = part[2:5]
    view += 1
    assert part.sum() == 3


def check_data_can_be_replaced_across_devices():
    start = live(1), live(2)
    weight = torch.nn.Parameter(torch.ones(256, device="npu:1"))
    (weight * 2).sum().backward()
    weight.grad = None
    weight.data = weight.data.to("npu:2")
    assert weight.device.index == 2 and isinstance(weight, torch.nn.Parameter) and weight.requires_grad
    assert (live(1), live(2)) == (start[0], start[1] + 1024)
    (weight * 2).sum().backward()
    assert weight.grad.device.index == 2
    weight.data = torch.zeros(128, device="npu:2")
    assert weight.shape == (128,)


def check_modules_keep_their_parameters_when_they_move():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    weight = model[0].weight
    weight.mark = "kept"
    model(torch.ones(1, 4)).sum().backward()
    expected = weight.grad.clone()
    model.to("npu:1")
    assert model[0].weight is weight is model[1].weight and weight.mark == "kept"
    assert weight.device.index == 1 and isinstance(weight, torch.nn.Parameter)
    same(weight.grad, expected)
    assert sum(1 for _ in model.parameters()) == 3
    model.cpu()
    assert model[0].weight is weight and type(weight) is torch.nn.Parameter and weight.device.type == "cpu"
    torch.testing.assert_close(weight.grad, expected)


def check_memory_runs_out_as_on_cuda():
    before = simulation.usage()
    message = raises(torch.OutOfMemoryError, lambda: torch.empty(17 * MIB, device="npu:2"))
    for phrase in (" out of memory.", "Tried to allocate 68.0 MiB", "npu:2", "total capacity of 64.0 MiB", "in use"):
        assert phrase in message, (phrase, message)
    # What was cached has gone back to the device; what is in tensors is as before.
    assert [device[:4] for device in simulation.usage()] == [device[:4] for device in before]
    held = torch.empty(15 * MIB, device="npu:2")
    raises(torch.OutOfMemoryError, lambda: held * 2)
    assert live(2) == before[2].live + 60 * MIB


def check_memory_that_runs_out_in_backward_can_be_caught():
    layers = torch.nn.Sequential(*(torch.nn.Linear(500, 500) for _ in range(4))).to("npu:1")
    x = torch.ones(2000, 500, device="npu:1")
    start = live(1)
    loss = layers(x).sum()
    held = torch.empty((64 * MIB - live(1) - 5 * MIB) // 4, device="npu:1")
    for _ in range(2):
        message = raises(torch.OutOfMemoryError, lambda loss=loss: loss.backward(retain_graph=True))
        assert "npu:1" in message
    del held, loss
    layers.zero_grad()
    assert live(1) == start
    layers(x).sum().backward()
    assert all(weight.grad is not None for weight in layers.parameters())


class _Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        raise KeyError("a user's mistake")


def check_other_errors_in_backward_stay_what_they_are():
    x = torch.ones(3, device="npu:1", requires_grad=True)
    raises(KeyError, lambda: _Broken.apply(x * 2).sum().backward())

    def forget(_):
        raise LookupError("nothing was kept")

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, forget):
        y = (x * x).sum()
    raises(LookupError, y.backward)
    (x * x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def _attend(device, dtype=torch.float32, heads=2, **options):
    torch.manual_seed(3)
    query = torch.randn(2, 4, 16, 8).to(device, dtype).requires_grad_()
    key, value = (torch.randn(2, heads, 16, 8).to(device, dtype).requires_grad_() for _ in range(2))
    mask = options.pop("attn_mask", None)
    mask = None if mask is None else mask.to(device)
    torch.manual_seed(4)  # each device draws from a generator of its own
    out = scaled_dot_product_attention(query, key, value, mask, enable_gqa=heads < 4, **options)
    (out * torch.linspace(0, 1, 8).to(device)).sum().backward()
    return out.detach(), query.grad, key.grad, value.grad


def check_attention_has_the_numbers_of_the_cpu():
    cut = torch.ones(2, 1, 16, 16, dtype=torch.bool).tril()
    for options in (
        {},
        {"is_causal": True},
        {"heads": 4, "attn_mask": cut},
        {"heads": 4, "attn_mask": torch.zeros(16, 16).masked_fill(~cut[0, 0], -1e4)},
        {"heads": 4, "scale": 0.5},
        {"heads": 4, "dropout_p": 0.3},
    ):
        for simulated, plain in zip(_attend("npu:1", **options), _attend("cpu", **options), strict=True):
            same(simulated, plain, 1e-5)


def check_attention_keeps_no_square():
    length, heads = 1024, 4
    square = heads * length * length * 4
    query = torch.randn(1, heads, length, 16, device="npu:0", requires_grad=True)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        simulation.reset_peaks()
        start = live(0)
        with context():
            scaled_dot_product_attention(query, query, query, is_causal=True).sum()
        assert simulation.usage()[0].peak - start < square / 8, context
    simulation.reset_peaks()
    scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    assert simulation.usage()[0].peak - live(0) < square / 8


def check_autocast_has_the_types_of_cuda():
    weight = torch.randn(8, 8, device="npu:1", requires_grad=True)
    x = torch.randn(4, 8, device="npu:1")
    start = live(1)
    with torch.autocast("npu", dtype=torch.bfloat16):
        y = linear(x, weight)
        assert y.dtype is torch.bfloat16 and (x @ weight).dtype is torch.bfloat16
        assert y.softmax(-1).dtype is torch.float32 and y.exp().dtype is torch.float32
        assert torch.cat([y, x]).dtype is torch.float32 and (y + y).dtype is torch.bfloat16
        assert torch.nn.functional.layer_norm(y, (8,)).dtype is torch.float32
        used = live(1)
        linear(x, weight)
        assert live(1) == used, "a weight is cast once"
        with torch.autocast("npu", enabled=False):
            assert linear(x, weight).dtype is torch.float32
    y.float().sum().backward()
    assert weight.grad.dtype is torch.float32
    del y
    weight.grad = None
    assert live(1) == start, "weights in the lower type are dropped when autocast ends"


def check_gradient_scaler_skips_infinite_gradients():
    weight = torch.nn.Parameter(torch.ones(4, device="npu:1"))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.npu.amp.GradScaler(init_scale=4.0)
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1, 1, 1, 1] and scaler.get_scale() == 2.0
    weight.grad = None
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    assert weight.tolist() == [0, 0, 0, 0]


def _optimized(make, devices):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5, 5).to(device)) for device in devices]
    optimizer = make(weights)
    for _ in range(3):
        sum((weight.cpu() ** 3).sum() for weight in weights).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [*(weight.detach() for weight in weights), norm]


def check_optimizers_span_devices():
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        actual = _optimized(lambda weights: torch.optim.AdamW(weights, lr=0.1, **options), ["npu:0", "npu:2", "npu:1"])  # noqa: B023
        plain = _optimized(lambda weights: torch.optim.AdamW(weights, lr=0.1, **options), ["cpu"] * 3)  # noqa: B023
        for simulated, expected in zip(actual, plain, strict=True):
            same(simulated, expected, 1e-5)


def check_optimizer_temporaries_count():
    weights = [torch.nn.Parameter(torch.ones(MIB // 4, device="npu:1")) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    # One weight at a time there are three of its size; fused none; and for all at once, which is what torch does on an
    # accelerator unless told otherwise, as much as all weights.
    for options, extra in (({"foreach": False}, 3 * MIB), ({"fused": True}, 0), ({}, 4 * MIB)):
        optimizer = torch.optim.AdamW(weights, **options)
        optimizer.step()
        simulation.reset_peaks()
        start = live(1)
        optimizer.step()
        temporary = simulation.usage()[1].peak - start
        assert extra <= temporary <= extra + 16384, (options, temporary)


def check_files_and_copies():
    model = torch.nn.Linear(3, 3).to("npu:1")
    file = io.BytesIO()
    torch.save({"state": model.state_dict(), "model": [model.weight]}, file)
    for place in (None, "cpu"):
        file.seek(0)
        state = torch.load(file, map_location=place)["state"]
        assert type(state["weight"]) is torch.Tensor and torch.equal(state["weight"], model.weight.cpu())
    file.seek(0)
    loaded = torch.load(file, map_location="npu:2")
    assert loaded["state"]["bias"].device.index == 2 and isinstance(loaded["model"][0], torch.nn.Parameter)
    twin = copy.deepcopy(model)
    assert twin.weight is not model.weight and torch.equal(twin.weight, model.weight)
    assert twin.weight.device.index == 1 and isinstance(twin.weight, torch.nn.Parameter)
    assert twin.weight.data_ptr() != model.weight.data_ptr() == model.weight.view(9).data_ptr()


def check_device_modules_answer():
    x = torch.ones(MIB, device="npu:1")
    for module in (torch.npu, torch.get_device_module("npu"), torch.accelerator):
        assert module.device_count() == 3 and module.is_available()
        assert module.memory_allocated(1) == live(1) and module.max_memory_allocated("npu:1") >= 4 * MIB
        module.synchronize()
        module.empty_cache()
    reserved = torch.npu.memory_reserved(1)
    assert live(1) <= reserved <= torch.npu.max_memory_reserved(1)
    assert torch.npu.mem_get_info(1) == (64 * MIB - reserved, 64 * MIB)
    assert torch.npu.memory_stats(1)["reserved_bytes.all.current"] == reserved
    assert torch.npu.mem_get_info(device=x.device) == torch.accelerator.get_memory_info(1)
    properties = torch.npu.get_device_properties(0)
    assert properties.name == torch.npu.get_device_name() == "simulated 64.0 MiB"
    assert properties.total_memory == 64 * MIB and torch.npu.is_bf16_supported()
    assert str(torch.accelerator.current_accelerator()) == "npu"
    assert torch.cuda.memory_reserved(0) == torch.cuda.memory_allocated(0) == 0
    torch.npu.reset_peak_memory_stats(1)
    assert torch.npu.max_memory_allocated(1) == live(1)
    assert (
        torch.npu.current_stream().query() and torch.npu.Event(enable_timing=True).elapsed_time(torch.npu.Event()) == 0
    )
    assert "invalid device ordinal" in raises(RuntimeError, lambda: torch.ones(1, device="npu:3"))


def check_the_current_device_can_be_changed():
    with torch.npu.device(2):
        assert torch.npu.current_device() == 2 == torch.ones(1, device="npu").device.index
        with torch.npu.device(-1):
            assert torch.accelerator.current_device_index() == 2
    assert torch.npu.current_device() == 0
    torch.npu.set_device("npu:1")
    assert torch.ones(1).npu().device.index == 1
    torch.accelerator.set_device_index(0)
    assert torch.ones(1).to("npu").device.index == 0


def check_threads_may_allocate_and_run_backward():
    start = live(0), live(1)
    failures = []

    def work(index):
        try:
            weight = torch.ones(64, 64, device=f"npu:{index}", requires_grad=True)
            for _ in range(100):
                (weight @ weight).sum().backward()
                weight.grad = None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and (live(0), live(1)) == start


def check_workers_load_data():
    dataset = torch.utils.data.TensorDataset(torch.arange(8.0))
    batches = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2, pin_memory=True)
    assert [batch.to("npu:1").sum().item() for (batch,) in batches] == [6, 22]


def check_inference_mode_takes_operations_apart():
    with torch.inference_mode():
        x = torch.ones(2, 3, device="npu:1")
        same(linear(x, torch.ones(4, 3, device="npu:1")), torch.full((2, 4), 3.0))
        assert x.to("npu:2").device.index == 2 and x.reshape(6).sum().item() == 6


def check_the_stand_in_has_the_operations_of_ms_swift():
    import torch_npu

    x, weight = torch.randn(2, 6, device="npu:1"), torch.full((6,), 2.0, device="npu:1")
    normal = torch.nn.functional.rms_norm(x.cpu(), (6,), weight.cpu(), 1e-6)
    same(torch_npu.npu_rms_norm(x, weight, epsilon=1e-6)[0], normal, 1e-5)
    first, second = x.cpu().chunk(2, -1)
    same(torch_npu.npu_swiglu(x, dim=-1), torch.nn.functional.silu(first) * second)
    cos, sin = torch.tensor(0.6, device="npu:1"), torch.tensor(0.8, device="npu:1")
    same(torch_npu.npu_rotary_mul(x, cos, sin), torch.cat((first * 0.6 - second * 0.8, second * 0.6 + first * 0.8), -1))
    assert torch_npu.npu is torch.npu


def check_experts_can_count_their_tokens():
    chosen = torch.tensor([0, 2, 2, 1], dtype=torch.int32, device="npu:0")
    assert torch.histc(chosen, bins=3, min=0, max=2).tolist() == [1, 1, 2]


def check_recurrent_layers_have_the_numbers_of_the_cpu():
    """Accelerators have kernels for the steps of LSTM and GRU that the CPU has not."""
    for kind in (torch.nn.LSTM, torch.nn.GRU):
        torch.manual_seed(0)
        plain = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        simulated = copy.deepcopy(plain).to("npu:1")
        x = torch.randn(3, 5, 6)
        expected, seen = plain(x)[0], simulated(x.to("npu:1"))[0]
        same(seen, expected, 1e-5)
        expected.square().sum().backward()
        seen.square().sum().backward()
        for parameter, reference in zip(simulated.parameters(), plain.parameters(), strict=True):
            same(parameter.grad, reference.grad, 1e-4)


main(globals())
