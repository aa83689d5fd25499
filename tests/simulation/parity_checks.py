"""What scripts rely on and CUDA devices do, on three simulated devices with real numbers."""

import weakref

import torch

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
    except error as found:
        assert type(found) is error, type(found)
        return str(found)
    raise AssertionError(f"no {error.__name__}")


def check_ordinary_tensors_are_written_to_in_inference_mode():
    """Every way to write into a view gives the CPU's numbers, and the tensor stays one that can be trained with."""

    def written(device):
        x, row, column = (torch.zeros(size, device=device) for size in ((4, 6), (6,), (4,)))
        with torch.inference_mode():
            x[:, 0], x[1], x[x > 5] = column + 1, row + 2, 9.0
            x.view(-1)[3:5].add_(1)
            x.index_put_((torch.tensor([2], device=device),), row + 3)
            x.scatter_(1, torch.tensor([[5]] * 4, device=device), 7.0)
            for part in (*x.chunk(2), *x.unbind(1), *x.split(1)):
                part.mul_(2)
            x.detach().sub_(1)
            torch.add(x, 1, out=x)
            copied = x.clone()
            copied[0] = row
            x.t_()
            x.unsqueeze_(0)
            x.squeeze_(0)
        return x, copied

    for simulated, plain in zip(written("npu:1"), written("cpu"), strict=True):
        assert torch.equal(simulated.cpu(), plain) and simulated.is_inference() == plain.is_inference()
    x = written("npu:1")[0]
    assert not x.is_inference() and not x[0].is_inference()
    weight = torch.ones(4, device="npu:1", requires_grad=True)
    (x @ weight).sum()


def check_tensors_made_in_inference_mode_stay_out_of_training():
    """They and their views are refused by autograd in torch's words, and a clone is not."""
    with torch.inference_mode():
        made = torch.ones(4, device="npu:0")
        part = made[1:]
    weight = torch.ones(4, device="npu:0", requires_grad=True)
    assert made.is_inference() and part.is_inference() and made.view(2, 2).is_inference()
    assert "Inference tensors cannot be saved for backward" in raises(RuntimeError, lambda: made * weight)
    (made.clone() * weight).sum().backward()
    assert weight.grad.tolist() == [1, 1, 1, 1]


def check_a_model_leaves_a_device_while_its_outputs_live():
    """`.cpu()`, `.half()` and another device keep each parameter, free the memory, and hold for what comes later."""
    start = live(1)
    model = torch.nn.Linear(512, 512).to("npu:1")
    weight, reference = model.weight, weakref.ref(model.weight)
    view, total = weight.view(-1), weight.sum().item()
    out = model(torch.ones(2, 512, device="npu:1"))
    model.half().float().cpu()
    assert model.weight is weight is reference() and type(weight) is torch.nn.Parameter
    assert weight.device.type == "cpu" and weight.is_leaf and weight.requires_grad
    assert view.device.index == 1 and view.sum().item() == total
    del view, out
    assert live(1) == start
    model(torch.ones(2, 512)).sum().backward()
    expected = weight.grad.clone()
    model.to("npu:2")
    assert model.weight is weight and weight.device.index == 2
    model(torch.ones(2, 512, device="npu:2")).sum().backward()
    assert torch.equal(weight.grad.cpu(), 2 * expected)
    for name in ("cpu", "npu:0", "cpu", "npu:1"):
        kept = model(torch.ones(2, 512, device=weight.device))
        model.to(name)
        assert model.weight is weight and weight.device == torch.device(name)
    model(torch.ones(2, 512, device="npu:1"))
    del kept


def check_graphs_of_a_parameter_that_has_left():
    """What saved the parameter itself meets it on the host, as on CUDA; otherwise its gradient arrives there."""
    start = live(1)
    weight = torch.nn.Parameter(torch.ones(MIB // 4, device="npu:1"))
    out = (weight * torch.ones(MIB // 4, device="npu:1").requires_grad_()).sum()
    weight.data = weight.data.cpu()
    assert live(1) - start < 2 * MIB, "a graph does not keep what the parameter had"
    assert "Expected all tensors to be on the same device" in raises(RuntimeError, out.backward)
    layer = torch.nn.Linear(4, 4).to("npu:1")
    out = layer(torch.ones(2, 4, device="npu:1")).sum()
    layer.cpu()
    out.backward()
    assert layer.weight.grad.device.type == "cpu" and layer.weight.grad.tolist() == [[2.0] * 4] * 4


def check_hooks_of_a_parameter_move_with_it():
    """Hooks on the gradient run once for each backward, wherever the parameter is."""
    layer = torch.nn.Linear(3, 3).to("npu:0")
    ran = []
    layer.weight.register_hook(lambda grad: ran.append("before") or grad * 2)
    layer.weight.register_post_accumulate_grad_hook(lambda weight: ran.append(str(weight.grad.device)))
    out = layer(torch.ones(2, 3, device="npu:0"))
    for name in ("cpu", "npu:2"):
        layer.to(name)
        layer(torch.ones(2, 3, device=name)).sum().backward()
    assert ran == ["before", "cpu", "before", "npu:2"], ran
    assert layer.weight.grad.tolist() == [[8.0] * 3] * 3
    del out


main(globals())
