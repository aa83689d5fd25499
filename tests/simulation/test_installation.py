"""Putting a machine into a process: whole, once, and never beside a real accelerator."""

from tests import processes

START = """
    import os, sys
    import torch
    from balance_shim import simulation
    from balance_shim.errors import SimulationError

    found = torch.Tensor.data, torch.load, torch.autograd._engine_run_backward, torch.accelerator.device_count
    spec = simulation.parse_spec("2x1GiB")

    def refused(*words):
        try:
            simulation.install(spec)
        except SimulationError as error:
            message = str(error)
            assert all(word in message for word in words) and "\\n" not in message, message
        else:
            raise AssertionError("not refused")
        assert not simulation.is_active() and simulation.usage() == ()
        now = torch.Tensor.data, torch.load, torch.autograd._engine_run_backward, torch.accelerator.device_count
        assert now == found and "torch_npu" not in sys.modules and not hasattr(torch, "npu")
        assert "DS_ACCELERATOR" not in os.environ
"""


def test_it_is_refused_where_it_would_harm_and_leaves_nothing():
    """A real accelerator or a torch without Python backends gives one line; afterwards it still can be installed."""
    text = """
    from unittest import mock

    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        refused("real accelerator (cuda)", "CUDA_VISIBLE_DEVICES")
    registration = torch.utils.backend_registration
    kept = registration._setup_privateuseone_for_python_backend
    del registration._setup_privateuseone_for_python_backend
    refused(torch.__version__, "newer torch")
    registration._setup_privateuseone_for_python_backend = kept
    simulation.install(spec)
    print(torch.ones(2, device="npu:1").sum().item(), os.environ["DS_ACCELERATOR"])
    """
    assert processes.output_of(START + text) == "2.0 cpu"


def test_real_accelerators_are_hidden_from_a_process_that_has_not_used_them():
    """CUDA reads its variable when it is first used, so a machine with GPUs can simulate; children inherit it."""
    text = """
    from unittest import mock

    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        refused("real accelerator (cuda)", "has used it")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    with mock.patch.object(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "-1"):
        simulation.install(spec)
    print(os.environ["CUDA_VISIBLE_DEVICES"], torch.accelerator.current_accelerator())
    """
    assert processes.output_of(START + text) == "-1 npu"


def test_zero3_is_refused_on_simulated_devices():
    """One line in place of ranks that cannot work together."""
    done = processes.code(
        """
        import balance_shim
        from transformers import TrainingArguments
        TrainingArguments(output_dir="/tmp/none", report_to=[])
        """,
        BALANCE_MODE="zero3",
        BALANCE_SIMULATE="2x1GiB",
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "BALANCE_MODE=zero3" in line]
    assert len(lines) == 1 and "does not run on simulated devices" in lines[0] and "BALANCE_NPROC" in lines[0]
    assert "Traceback" not in done.stderr


def test_it_is_refused_beside_another_backend():
    """torch takes one additional backend; the message names the one that is there."""
    text = """
    torch.utils.rename_privateuse1_backend("other")
    refused("additional backend here (other)")
    """
    processes.output_of(START + text)


def test_a_failure_half_way_leaves_nothing():
    """What had been patched when something failed is as found."""
    text = """
    from unittest import mock

    with mock.patch("balance_shim.simulation.stand_in.make_package", side_effect=OSError("half way")):
        try:
            simulation.install(spec)
        except OSError:
            pass
    now = torch.Tensor.data, torch.load, torch.autograd._engine_run_backward, torch.accelerator.device_count
    assert now == found and not simulation.is_active() and not hasattr(torch, "npu")
    x = torch.ones(3, requires_grad=True)
    (x * x).sum().backward()
    print(x.grad.tolist())
    """
    assert processes.output_of(START + text) == "[2.0, 2.0, 2.0]"


def test_the_same_machine_may_be_installed_again_another_not():
    """A second installation of the same machine changes nothing; one of another machine is refused."""
    text = """
    os.environ["DS_ACCELERATOR"] = "mine"
    simulation.install(spec)
    x = torch.ones(128, device="npu:1")
    simulation.install(simulation.parse_spec("1GiB+1GiB"))
    assert simulation.usage()[1].live == 512 and os.environ["DS_ACCELERATOR"] == "mine"
    try:
        simulation.install(simulation.parse_spec("3x1GiB"))
    except SimulationError as error:
        print(error)
    """
    assert "one machine per run" in processes.output_of(START + text)
