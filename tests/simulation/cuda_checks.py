"""A program that writes "cuda" and `torch.cuda`, on three simulated devices. This file is the program."""

import copy
import pickle

import torch

from balance_shim import simulation
from balance_shim.units import MIB
from tests.simulation.child import main

simulation.install(simulation.parse_spec("3x64MiB"))

FIRST, SECOND, THIRD = (torch.device("npu", index) for index in range(3))


def check_devices_by_name():
    """`torch.device` translates the name, in every way to write it, and what it makes are torch's own objects."""
    for device in (torch.device("cuda:1"), torch.device("cuda", 1), torch.device(type="cuda", index=1)):
        assert device == SECOND and isinstance(device, torch.device)
        assert pickle.loads(pickle.dumps(device)) == copy.deepcopy(device) == device
    assert torch.device("cpu").type == "cpu" and torch.device("meta").type == "meta" and torch.device(2) == THIRD
    assert not isinstance("cuda", torch.device) and str(torch.device("cuda")) == "npu"
    with torch.device("cuda:1"):
        assert torch.ones(2).device == torch.nn.Linear(2, 2).weight.device == torch.tensor([1]).device == SECOND
    torch.set_default_device("cuda:2")
    made = torch.zeros(2)
    torch.set_default_device(None)
    assert made.device == THIRD and torch.zeros(2).device.type == "cpu"


def check_tensors_are_made_there():
    """Factories, `.to`, `.cuda` and methods that make a tensor from another take the name."""
    plain = torch.ones(2)
    for tensor in (
        torch.ones(2, device="cuda:1"),
        torch.tensor([1.0, 1.0], device="cuda:1"),
        torch.full((2,), 1.0, device=torch.device("cuda:1")),
        torch.zeros_like(plain, device="cuda:1") + 1,
        torch.as_tensor([1.0, 1.0], device="cuda:1"),
        plain.to("cuda:1"),
        plain.to(device="cuda:1"),
        plain.cuda(1),
        plain.cuda("cuda:1"),
        plain.to("cuda:1", torch.float64).float(),
        plain.new_ones(2, device="cuda:1"),
        plain.cuda(1).new_tensor([1.0, 1.0]),
    ):
        assert tensor.device == SECOND and tensor.tolist() == [1, 1]
    assert plain.cuda().device == torch.randn(2, device="cuda").device == FIRST
    assert torch.randint(5, (2,), device="cuda:2").device == torch.arange(3, device="cuda:2").device == THIRD
    generator = torch.Generator(device="cuda:1").manual_seed(1)
    assert torch.randn(2, device="cuda:1", generator=generator).device == generator.device == SECOND
    assert not plain.cuda().is_cuda and plain.cuda().device.type == "npu", "a tensor's own answers stay true"


def check_modules_move_there():
    """`.to`, `.cuda`, `to_empty` and the argument `device` put a module on the device that is named."""
    for module in (
        torch.nn.Linear(2, 2).to("cuda:1"),
        torch.nn.Linear(2, 2).to(torch.device("cuda:1"), torch.float32),
        torch.nn.Linear(2, 2).cuda(1),
        torch.nn.Linear(2, 2, device="cuda:1"),
        torch.nn.Linear(2, 2, device="meta").to_empty(device="cuda:1"),
    ):
        assert module.weight.device == SECOND and isinstance(module.weight, torch.nn.Parameter)
    with torch.cuda.device(2):
        assert torch.nn.Linear(2, 2).cuda().weight.device == THIRD


def check_scripted_functions_compile():
    """Libraries compile functions with TorchScript while they are imported (ms-swift 4.6 does)."""

    def scripted(like: torch.Tensor, index: torch.Tensor):
        made = torch.empty((2,), dtype=like.dtype, device=like.device)
        made[:] = torch.arange(2, device=like.device)
        return made.index_select(0, index) + torch.zeros_like(like)

    assert torch.jit.script(scripted)(torch.ones(2), torch.tensor([1, 0])).tolist() == [1.0, 0.0]


def check_questions_to_torch_cuda():
    """The module's functions answer for the simulated devices."""
    assert torch.cuda.is_available() and torch.cuda.device_count() == 3 and torch.cuda.is_initialized()
    held = torch.ones(MIB, device="cuda:1")
    used = torch.cuda.memory_allocated(1)
    assert used == torch.cuda.memory_allocated("cuda:1") >= 4 * MIB
    assert torch.cuda.mem_get_info(1)[1] == torch.cuda.get_device_properties("cuda:1").total_memory == 64 * MIB
    assert torch.cuda.max_memory_allocated(1) == torch.cuda.memory.max_memory_allocated(1) >= used
    assert torch.cuda.memory_stats(1)["allocated_bytes.all.current"] == used
    del held
    torch.cuda.reset_peak_memory_stats("cuda:1")
    assert torch.cuda.max_memory_allocated(1) == used - 4 * MIB
    torch.cuda.set_device("cuda:1")
    assert torch.cuda.current_device() == 1 and torch.ones(1).cuda().device == SECOND
    library = compile("import torch\ncurrent = torch.cuda.current_device()", "/x/site-packages/a.py", "exec")
    namespace: dict[str, object] = {}
    exec(library, namespace)  # transformers' Reformer, which finds default generators
    assert namespace["current"] == 1
    torch.cuda.set_device(0)
    assert torch.cuda.get_device_capability() == (8, 0) and torch.cuda.is_bf16_supported()
    assert torch.cuda.get_device_name(2) == torch.npu.get_device_name(2)
    torch.cuda.manual_seed_all(4)
    first = torch.rand(2, device="cuda:2")
    torch.cuda.manual_seed_all(4)
    assert torch.equal(first, torch.rand(2, device="cuda:2")) and len(torch.cuda.get_rng_state_all()) == 3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.nvtx.range_push("work")
        end.record()
        torch.cuda.nvtx.range_pop()
    torch.cuda.current_stream().synchronize()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert start.elapsed_time(end) == 0


def check_mixed_precision_by_name():
    """`torch.autocast("cuda")`, `torch.cuda.amp` and both gradient scalers act on the simulated devices."""
    x = torch.ones(2, 2, device="cuda")
    for context in (torch.autocast("cuda", torch.bfloat16), torch.cuda.amp.autocast(dtype=torch.bfloat16)):
        with context:
            assert (x @ x).dtype is torch.bfloat16
            assert torch.is_autocast_enabled() and torch.is_autocast_enabled("cuda")
            assert torch.get_autocast_dtype("cuda") is torch.get_autocast_gpu_dtype() is torch.bfloat16
        assert not torch.is_autocast_enabled() and (x @ x).dtype is torch.float32
    for make in (torch.amp.GradScaler, torch.cuda.amp.GradScaler, lambda: torch.amp.GradScaler("cuda")):
        weight = torch.nn.Parameter(torch.ones(2, device="cuda:1"))
        scaler, optimizer = make(), torch.optim.SGD([weight], lr=1.0)
        assert scaler.is_enabled()
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [0, 0]


def check_installed_libraries_see_no_cuda_devices():
    """Told of both names they would mix them: to code in an installed package `torch.cuda` is what it is without."""
    ask = "answer = torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.memory_allocated(0)"
    for path, expected in (
        ("/opt/lib/python3/site-packages/somebody/devices.py", (False, 0, 0)),
        ("/usr/lib/python3/dist-packages/somebody.py", (False, 0, 0)),
        ("/home/me/train.py", (True, 3, torch.npu.memory_allocated(0))),
        ("<stdin>", (True, 3, torch.npu.memory_allocated(0))),
    ):
        names = {"torch": torch}
        exec(compile(ask, path, "exec"), names)
        assert names["answer"] == expected, (path, names["answer"])
    from accelerate.utils import is_cuda_available, is_npu_available

    assert is_npu_available() and not is_cuda_available()


def check_files_come_back_there():
    """`torch.load(map_location="cuda:1")` and safetensors' `device` name the simulated device as well."""
    import tempfile

    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        torch.save({"weight": torch.ones(2, device="cuda")}, f"{folder}/one.pt")
        assert torch.load(f"{folder}/one.pt", map_location="cuda:1")["weight"].device == SECOND
        save_file({"weight": torch.ones(2, device="cuda")}, f"{folder}/one.safetensors")
        assert load_file(f"{folder}/one.safetensors", device="cuda:1")["weight"].device == SECOND


main(globals())
