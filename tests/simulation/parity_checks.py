"""What scripts rely on and CUDA devices do, on three simulated devices with real numbers."""

import copy
import pickle
import weakref

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

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
        outputs = model(torch.ones(2, 512, device=weight.device))
        model.to(name)
        assert model.weight is weight and weight.device == torch.device(name)
    model(torch.ones(2, 512, device="npu:1"))
    del outputs


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


def check_each_device_draws_from_a_generator_of_its_own():
    """All begin alike, with the numbers of the CPU's generator, and none is moved on by another or by the host."""

    def random_tensors(device):
        return (
            torch.randn(5, device=device),
            torch.nn.functional.dropout(torch.ones(20, device=device), 0.5),
            torch.randperm(9, device=device),
            torch.rand_like(torch.ones(3, device=device)),
            torch.bernoulli(torch.full((4,), 0.5, device=device)),
            torch.multinomial(torch.ones(6, device=device), 3),
            scaled_dot_product_attention(*[torch.ones(1, 1, 4, 2, device=device)] * 3, dropout_p=0.5),
            torch.nn.functional.dropout1d(torch.ones(2, 6, 3, device=device), 0.5),
            torch.randint(9, (3,), device=device),
        )

    torch.manual_seed(7)
    expected = random_tensors("cpu")
    torch.manual_seed(7)
    first = random_tensors("npu:1")
    host = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(host, torch.rand(3)), "a device moves the host's generator on"
    mixed = [random_tensors("npu:0"), random_tensors("npu:2"), random_tensors("npu:2")]
    for one, two, three, plain in zip(first, *mixed[:2], expected, strict=True):
        assert torch.equal(one.cpu(), plain), plain
        assert torch.equal(two.cpu(), plain) and torch.equal(three.cpu(), plain)
    assert not torch.equal(mixed[2][0], mixed[1][0])


def check_states_of_generators():
    """Getting, setting, forking and seeding work for one device, for the current one, and for all, as on CUDA."""
    torch.manual_seed(3)
    torch.rand(5, device="npu:1")
    states = torch.npu.get_rng_state_all()
    assert len(states) == 3 and torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])
    assert torch.equal(torch.npu.get_rng_state("npu:1"), states[1]) and torch.equal(
        torch.npu.get_rng_state(), states[0]
    )
    first = [torch.rand(3, device=f"npu:{index}") for index in range(3)]
    torch.npu.set_rng_state_all(states)
    assert all(torch.equal(torch.rand(3, device=one.device), one) for one in first)
    torch.npu.set_rng_state(states[1], 1)
    assert torch.equal(torch.rand(3, device="npu:1"), first[1])
    torch.npu.set_rng_state_all(states)
    with torch.random.fork_rng(devices=[1], device_type="npu"):
        torch.rand(9, device="npu:1")
        torch.rand(9, device="npu:2")
    assert torch.equal(torch.rand(3, device="npu:1"), first[1])
    assert not torch.equal(torch.rand(3, device="npu:2"), first[2])
    with torch.npu.device(2):
        torch.npu.manual_seed(11)
        assert torch.npu.initial_seed() == 11
    assert torch.npu.initial_seed() == 3
    torch.npu.manual_seed_all(12)
    assert torch.equal(torch.rand(3, device="npu:0").cpu(), torch.rand(3, device="npu:2").cpu())
    torch.npu.seed_all()
    assert torch.npu.initial_seed() != 12


def check_generators_that_a_script_makes():
    """They draw for their device with their seed, and one of the host is refused in CUDA's words."""
    generator = torch.Generator(device="npu:1").manual_seed(5)
    assert isinstance(generator, torch.Generator) and generator.device == torch.device("npu", 1)
    plain = torch.Generator().manual_seed(5)
    assert isinstance(plain, torch.Generator) and plain.device.type == "cpu"
    before = torch.npu.get_rng_state(1)
    assert torch.equal(torch.randn(4, generator=generator, device="npu:1").cpu(), torch.randn(4, generator=plain))
    assert torch.equal(torch.randperm(4, generator=generator, device="npu:1").cpu(), torch.randperm(4, generator=plain))
    copies = copy.deepcopy(generator), pickle.loads(pickle.dumps(generator)), generator.clone_state()
    expected = torch.empty(4).normal_(generator=plain)
    for one in (generator, *copies):
        assert one.device.type == "npu"
        assert torch.equal(torch.empty(4, device="npu:1").normal_(generator=one).cpu(), expected)
    assert torch.equal(before, torch.npu.get_rng_state(1))
    for act in (
        lambda: torch.randn(4, generator=plain, device="npu:1"),
        lambda: torch.randperm(4, generator=plain, device="npu:1"),
        lambda: torch.multinomial(torch.ones(4, device="npu:0"), 2, generator=plain),
    ):
        assert "Expected a 'npu' device type for generator but found 'cpu'" in raises(RuntimeError, act)
    loader = torch.utils.data.DataLoader(range(9), shuffle=True, generator=plain, batch_size=9)
    assert sorted(next(iter(loader)).tolist()) == list(range(9))


def check_checkpointing_repeats_the_masks_of_its_device_only():
    """Recomputed dropout has the mask of the forward pass where arguments and layer share a device.

    Where the layer moves its arguments to its own device inside, torch restores the state of theirs: as on CUDA the
    mask is then another, which is a fault of programs that a simulation must not hide.
    """

    def gradient(inside, outside, use_reentrant):
        torch.manual_seed(1)
        x = torch.ones(64, device=outside, requires_grad=True)
        out = checkpoint(lambda x: dropout(x.to(inside), 0.5), x, use_reentrant=use_reentrant)
        out.sum().backward()
        return out.detach().cpu(), x.grad.cpu()

    for use_reentrant in (True, False):
        out, grad = gradient("npu:1", "npu:1", use_reentrant)
        assert torch.equal(out, grad)
        out, grad = gradient("npu:2", "npu:1", use_reentrant)
        assert not torch.equal(out, grad)


def check_data_parallel():
    """Outputs and gradients are those of one device, in torch's own class and its functional form."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to("npu:0")
    x = torch.randn(7, 4).to("npu:0")
    expected = model(x)
    expected.pow(2).sum().backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    for run in (torch.nn.DataParallel(model), lambda x: torch.nn.parallel.data_parallel(model, x, [0, 1, 2])):
        model.zero_grad()
        simulation.reset_peaks()
        start = [device.live for device in simulation.usage()]
        out = run(x)
        out.pow(2).sum().backward()
        assert out.device.index == 0 and torch.allclose(out.cpu(), expected.cpu(), atol=1e-6)
        assert all(device.peak > live for device, live in zip(simulation.usage(), start, strict=True))
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.allclose(weight.grad.cpu(), gradient.cpu(), atol=1e-5)


main(globals())
