"""The table of peaks at the end of a run: what it says, where, and which process writes it."""

from balance_shim.simulation.report import summary
from balance_shim.timing.step_time import StepTime
from balance_shim.units import GIB
from balance_shim.virtual.ledger import DeviceUsage
from tests import processes

HEADLINE = "balance_shim: memory of the simulated devices"

START = """
    import torch
    from balance_shim import simulation
    simulation.install(simulation.parse_spec("2x1GiB"))
    simulation.report_at_exit()
    simulation.report_at_exit()
"""


def test_the_table_has_each_device_and_ends_with_the_evenness():
    """Capacity, peak and its share in each row; the largest peak over the mean in the last line."""
    usage = (DeviceUsage("npu:0", 80 * GIB, 0, 60 * GIB), DeviceUsage("npu:1", 24 * GIB, GIB, 20 * GIB))
    lines = summary(usage).splitlines()
    for line, figures in zip(lines[1:3], (["80.0", "60.0", "75.0"], ["24.0", "20.0", "83.3"]), strict=True):
        assert all(figure in line for figure in figures), line
    assert lines[-1].endswith("1.50")


def test_the_table_has_busy_shares_where_there_is_a_clock():
    """A column for each device, and the time of a step with what bounds it below the table."""
    usage = (DeviceUsage("npu:0", 80 * GIB, 0, 60 * GIB), DeviceUsage("npu:1", 24 * GIB, GIB, 20 * GIB))
    text = summary(usage, StepTime(0.5, 0, (0.25, 0.75), "one device at a time"))
    lines = text.splitlines()
    assert lines[1].endswith("25%") and lines[2].endswith("75%")
    assert "500 ms" in lines[-1] and "one device" in lines[-1]


def test_a_program_that_fails_still_reports_on_standard_error():
    """After the traceback, once, and with nothing of ours on standard output."""
    done = processes.code(
        START + "    torch.empty(2**20, device='npu:1')\n    print('mine')\n    raise KeyError('end')"
    )
    assert done.returncode == 1 and done.stdout == "mine\n"
    assert done.stderr.count(HEADLINE) == 1 and done.stderr.index("KeyError") < done.stderr.index(HEADLINE)
    assert "4.0 MiB" in done.stderr


def test_workers_do_not_report(tmp_path):
    """Neither a forked child that ends like a program nor a spawned worker writes a table."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, sys, torch\n"
        "from balance_shim import simulation\n"
        "simulation.install(simulation.parse_spec('2x1GiB'))\n"
        "simulation.report_at_exit()\n"
        "tensor = torch.ones(1, device='npu:1')\n"
        "def work():\n"
        "    print('worked', flush=True)\n"
        "if __name__ == '__main__':\n"
        "    if os.fork() == 0:\n"
        "        sys.exit()\n"
        "    os.wait()\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    worker.start()\n"
        "    worker.join()\n",
        encoding="utf-8",
    )
    done = processes.python(str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "worked\n" and done.stderr.count(HEADLINE) == 1
