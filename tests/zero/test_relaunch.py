"""Which programs are executed again as several processes, and by which command."""

import os
import signal
import sys

import pytest

from balance_shim import devices, log, state
from balance_shim.settings import Settings
from balance_shim.zero import ranks
from balance_shim.zero.launching import rank_environment, relaunch, requirements
from tests.processes import INJECTED, SHIM, python
from tests.sampling import sampled

WORDS = {
    "a script": ["train.py", "--name", "two words", "-x"],
    "options of Python": ["-u", "-X", "dev", "-Wignore", "train.py", "-m"],
    "a module": ["-m", "pkg.train", "--steps", "1"],
    "a module in one word": ["-Bmpkg.train", "1"],
    "a console program": ["/usr/bin/tune", "run"],
    "hash-based": ["--check-hash-based-pycs", "always", "train.py"],
}


@pytest.mark.parametrize("name", WORDS)
def test_the_command_of_each_rank_is_the_users_own(name):
    """Options of the interpreter, the program and its arguments come back word for word."""
    command = relaunch.command(["python", *WORDS[name]], 3, {})
    assert command[:2] == [sys.executable, relaunch.LAUNCHER] and "--standalone" in command
    place = command.index("--no-python")
    assert "--nproc-per-node=3" in command[:place]
    assert command[place + 1 :] == [sys.executable, *WORDS[name]]


def test_the_users_own_port_is_used():
    """MASTER_PORT, and MASTER_ADDR with it, are obeyed instead of a free port of this host."""
    command = relaunch.command(["python", "a.py"], 2, {"MASTER_PORT": "29511", "MASTER_ADDR": "10.0.0.1"})
    assert {"--master-addr=10.0.0.1", "--master-port=29511"} <= set(command) and "--standalone" not in command


@pytest.mark.parametrize(
    "arguments",
    [["-c", "pass"], ["-cpass"], ["-ucpass"], ["-"], [], ["-i"], ["-m", "ipykernel_launcher", "-f", "x"],
     ["-m", "IPython"], ["/usr/bin/ipython3"], ["-mipykernel"]],
)  # fmt: skip
def test_what_cannot_be_run_again_is_refused(arguments):
    """Code on the command line or from a pipe, prompts and notebooks; the line says what to do."""
    with pytest.raises(relaunch.Unrepeatable, match="save it as a script"):
        relaunch.program(["python", *arguments])


@pytest.mark.parametrize(
    ("environ", "launched"),
    [({}, False), ({"RANK": "0"}, True), ({"WORLD_SIZE": "1"}, True), ({"TORCHELASTIC_RUN_ID": "x"}, True),
     ({"OMPI_COMM_WORLD_RANK": "0"}, True), ({"PMI_RANK": "1"}, True), ({"SLURM_PROCID": "0"}, False),
     ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False), ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False),
     ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967291"}, False),
     ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, True),
     ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
     ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False), ({"RANK": ""}, False)],
)  # fmt: skip
def test_inside_another_launcher(environ, launched):
    """torchrun, accelerate, deepspeed, MPI and srun are known by what they tell their ranks; sbatch starts none."""
    assert relaunch.is_launched(environ) is launched


@pytest.mark.parametrize(
    ("arguments", "own"),
    [(["/x/bin/accelerate", "launch", "a.py"], True), (["-m", "accelerate.commands.launch", "a.py"], True),
     (["-m", "torch.distributed.run", "a.py"], True), (["/x/bin/swift", "sft"], True), (["train.py"], False),
     (["-m", "deepspeed_free.train"], False), (["-m", "pkg.accelerate"], False), (["-c", "swift"], False),
     (["/x/bin/trl", "sft"], True), (["-m", "trl.cli.main", "sft"], True), (["-mtrl", "sft"], True),
     (["/x/trl/scripts/sft.py"], False), (["-m", "trl.scripts.sft"], False), (["-m", "axolotl.cli.train", "c"], False),
     (["/x/bin/axolotl", "train"], True), (["-m", "accelerate", "launch"], True), (["-u", "-maccelerate"], True),
     (["/x/bin/axolotl", "train", "c.yml", "--launcher", "torchrun"], True),
     (["/x/bin/axolotl", "train", "c.yml", "--launcher", "python"], False),
     (["/x/bin/axolotl", "train", "--launcher=python", "c.yml"], False)],
)  # fmt: skip
def test_programs_with_a_launcher_of_their_own(arguments, own):
    """They start the ranks themselves, so they are not started several times."""
    assert relaunch.has_own_launcher(["python", *arguments]) is own


def test_ranks_of_srun_know_where_to_meet():
    """SLURM's variables become those that torch.distributed reads."""
    environ = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
               "SLURM_NODELIST": "gpu[003-004,7]", "SLURM_JOB_ID": "123"}  # fmt: skip
    ranks.complete_environment(environ)
    assert {name: environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu003", "MASTER_PORT": "20123"}  # fmt: skip


def test_ranks_of_mpi_without_an_address_are_told_what_to_set():
    """Nothing in MPI's variables says where rank 0 is."""
    with pytest.raises(RuntimeError, match="set MASTER_ADDR"):
        ranks.complete_environment({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("environ", "count", "local"),
    [({"LOCAL_RANK": "3"}, 1, "0"), ({"LOCAL_RANK": "3"}, 4, "3"), ({"LOCAL_RANK": "3"}, 0, "3"),
     ({"LOCAL_RANK": "0"}, 1, "0"),
     ({"LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 1, "0")],
)  # fmt: skip
def test_a_rank_that_sees_one_device_uses_that(environ, count, local):
    """`srun --gpus-per-task=1` shows each rank one device, whatever its number on the machine is."""
    ranks.use_visible_device(environ, count)
    assert environ["LOCAL_RANK"] == local == environ.get("OMPI_COMM_WORLD_LOCAL_RANK", local)


def test_more_ranks_than_devices_are_refused():
    """A launcher that starts more processes than there are devices is told, before the driver refuses a device."""
    with pytest.raises(RuntimeError, match="4 devices; start one process per device"):
        ranks.use_visible_device({"LOCAL_RANK": "5"}, 4)


def test_a_number_of_processes_that_cannot_act_is_said(monkeypatch, capsys):
    """BALANCE_NPROC that another launcher overrides has a line, on the first rank of the machine only."""
    for wanted, there, rank, lines in ((4, "2", "0", 1), (4, "2", "1", 0), (2, "2", "0", 0), (3, "", "0", 1)):
        monkeypatch.setattr(log, "_said", set())
        monkeypatch.setattr(state, "settings", lambda wanted=wanted: Settings(nproc=wanted))
        environ = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": there}
        relaunch.note_ignored_count(environ)
        stderr = capsys.readouterr().err
        assert stderr.count(f"BALANCE_NPROC={wanted} is ignored: a launcher has started") == lines, stderr


def test_more_processes_than_devices_are_refused(monkeypatch):
    """BALANCE_NPROC above the number of devices ends in one line; without devices any number trains on the CPU."""
    monkeypatch.setattr(state, "settings", lambda: Settings(nproc=8))
    monkeypatch.setattr(devices, "count", lambda: 4)
    with pytest.raises(RuntimeError, match="BALANCE_NPROC=8, but there are 4 devices"):
        relaunch.process_count()
    monkeypatch.setattr(devices, "count", lambda: 0)
    assert relaunch.process_count() == 8


@pytest.mark.parametrize(
    ("version", "kind", "home", "missing"),
    [("0.18.0", "cuda", None, True), ("0.19.8", "cuda", None, False), ("0.18.0", "cuda", "/usr/local/cuda", False),
     ("0.18.0", None, None, False), ("0.18.0", "npu", None, False)],
)  # fmt: skip
def test_older_deepspeed_needs_the_toolkit_where_there_is_a_gpu(monkeypatch, version, kind, home, missing):
    """It cannot be imported without; that is found out before any process is started, and the line has the remedy."""
    import torch
    from torch.utils import cpp_extension

    monkeypatch.setattr(devices, "accelerator_type", lambda: kind)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert requirements.lacks_toolkit(version) is missing
    if missing:
        installed = {"deepspeed": version, "accelerate": "1.5.0"}
        monkeypatch.setattr(requirements, "version_text", installed.get)
        with pytest.raises(RuntimeError, match=r"pip install -U 'deepspeed>=0\.19\.8'"):
            requirements.check()


@pytest.mark.parametrize(
    ("kind", "offload", "shared"), [(None, "none", True), ("cuda", "none", False), ("cuda", "optimizer", True)]
)
def test_cores_are_shared_where_ranks_compute_on_the_host(monkeypatch, kind, offload, shared):
    """torch.distributed.run gives each rank one thread, with which an offloaded optimizer's step takes many seconds."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "accelerator_type", lambda: kind)
    monkeypatch.setattr(state, "settings", lambda: Settings(offload=offload))
    assert ("OMP_NUM_THREADS" in relaunch.threads_for(2)) is shared


def test_flight_recorder_where_nobody_has_set_it(monkeypatch):
    """On CUDA ranks get its variables under the names of all torch versions; those that are set stay, also at 0."""
    monkeypatch.setattr(devices, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(rank_environment, "_smallest", lambda kind: 24 << 30)
    added = rank_environment.variables({})
    assert added["TORCH_FR_BUFFER_SIZE"] == added["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "2000"
    assert added["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and added[rank_environment.SMALLEST_DEVICE] == str(24 << 30)
    assert added["TORCH_FR_DUMP_TEMP_FILE"] == added["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
    users = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_DUMP_TEMP_FILE": "x"}
    assert rank_environment.variables(users) == {rank_environment.SMALLEST_DEVICE: str(24 << 30)}
    for kind, expected in (("npu", {rank_environment.SMALLEST_DEVICE}), (None, set())):
        monkeypatch.setattr(devices, "accelerator_type", lambda kind=kind: kind)
        assert rank_environment.variables({}).keys() == expected


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[01,03-4]", "n01"), ("a,n[1-2]", "a")]
)
def test_first_host_of_a_list(nodes, first):
    """As SLURM writes lists of hosts."""
    assert ranks.first_host(nodes) == first


def test_a_rank_whose_launcher_is_gone_ends():
    """Killed before the rank could ask the kernel to be told, the launcher has left it another parent."""
    code = "from balance_shim.zero import ranks; ranks.die_with_launcher(); print('went on')"
    outcomes = [
        python("-c", code, BALANCE_MODE="off", TORCHELASTIC_RUN_ID="x", **{ranks.LAUNCHER_PROCESS: process})
        for process in (str(os.getpid()), "1073741824")
    ]
    assert [done.returncode for done in outcomes] == [0, -signal.SIGTERM]
    assert [done.stdout for done in outcomes] == ["went on\n", ""]


def test_workers_of_datasets_are_workers():
    """They come from a copy of `multiprocessing` under another name, and must not be executed again."""
    code = """
import multiprocess
from balance_shim.processes import is_worker
with multiprocess.Pool(1) as pool:
    print(is_worker(), pool.apply(is_worker))
"""
    done = python("-c", code, BALANCE_MODE="off")
    assert done.stdout == "False True\n", done.stderr


TRAIN = """\
import os, sys
from transformers import TrainingArguments
print(os.environ["RANK"], os.getcwd(), sys.argv[1:], sys.flags.dev_mode, flush=True)
os.environ.pop("RANK")
"""
ZERO = {"BALANCE_MODE": "zero3", "BALANCE_NPROC": "2", "CUDA_VISIBLE_DEVICES": ""}
INJECTED_PATHS = (SHIM, INJECTED)


@pytest.mark.parametrize("way", sampled(["script", "module"], "script"))
def test_started_plainly_it_runs_twice(way, tmp_path):
    """Both ranks get the arguments and options of the one process, in the folder where it was started.

    The folder's name has spaces and letters beyond ASCII.
    """
    folder = tmp_path / "größe und 値"
    package = folder / "pkg"
    package.mkdir(parents=True)
    (package / "train.py").write_text("import os; os.chdir('/'); " + TRAIN)
    program = ["-m", "pkg.train"] if way == "module" else [str(package / "train.py")]
    paths = (*INJECTED_PATHS, folder)
    done = python("-X", "dev", *program, "two words", "--x", paths=paths, timeout=200, **ZERO)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "two words" in line]
    assert sorted(lines) == [f"{rank} / ['two words', '--x'] True" for rank in (0, 1)]


REFUSALS = {
    "code": (["-c", "from transformers import TrainingArguments as A; A('o')"], {}, "python -c cannot be run"),
    "one device": (["SCRIPT"], {"BALANCE_NPROC": "", "BALANCE_SIMULATE": "1x1GiB"}, "not run on simulated devices"),
    "no device": (["SCRIPT"], {"BALANCE_NPROC": ""}, "no accelerator here; BALANCE_NPROC=2"),
    "port in use": (["SCRIPT"], {"MASTER_PORT": "USED"}, "cannot be used (Address already in use)"),
    "no port": (["SCRIPT"], {"MASTER_PORT": "x"}, "MASTER_PORT='x' is not a port"),
    "bad JSON": (["SCRIPT"], {"BALANCE_ZERO_CONFIG": "{1}"}, "BALANCE_ZERO_CONFIG is not JSON"),
    "no file": (["SCRIPT"], {"BALANCE_ZERO_CONFIG": "/no/file.json"}, "cannot be read (No such file or directory)"),
    "stage 2": (
        ["SCRIPT"], {"BALANCE_ZERO_CONFIG": '{"zero_optimization": {"stage": 2}}'}, "asks for ZeRO stage 2",
    ),
    "DeepSpeed missing": (["SCRIPT"], {"HIDE": "deepspeed"}, "needs deepspeed, which is not installed (pip install"),
    "DeepSpeed too old": (["SCRIPT"], {"OLD": "deepspeed"}, "needs deepspeed 0.16.0 or newer; 0.9.1 is installed"),
}  # fmt: skip
HIDING = """\
import importlib.metadata as metadata, os
original = metadata.version
def version(name):
    if name == os.environ.get("HIDE"):
        raise metadata.PackageNotFoundError(name)
    return "0.9.1" if name == os.environ.get("OLD") else original(name)
metadata.version = version
"""


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_had_is_one_line(name, tmp_path):
    """A request that cannot be met ends the program before anything is trained, with one line that gives the reason."""
    import socket

    arguments, variables, expected = REFUSALS[name]
    script = tmp_path / "train.py"
    script.write_text("from transformers import TrainingArguments\nTrainingArguments('out')\nprint('went on')\n")
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {key: port if text == "USED" else text for key, text in variables.items()}
        command = [str(script) if argument == "SCRIPT" else argument for argument in arguments]
        done = python(*command, paths=(*INJECTED_PATHS, tmp_path), **{**ZERO, **variables})
    assert done.returncode != 0 and "went on" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if "balance_shim" in line or expected in line]
    assert len(lines) == 1 and expected in lines[0], done.stderr[-3000:]
    assert lines[0] == done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_what_all_ranks_are_refused_is_said_once(tmp_path):
    """Where ranks are there already, the launcher has the line, and no rank a traceback."""
    script = tmp_path / "train.py"
    script.write_text(
        "from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments\n"
        "LlamaConfig().save_pretrained('model')\n"
        "AutoModelForCausalLM.from_pretrained('model', quantization_config={'load_in_4bit': True})\n"
    )
    done = python(str(script), paths=INJECTED_PATHS, cwd=tmp_path, timeout=200, **ZERO, BALANCE_NPROCS="3")
    lines = [line for line in done.stderr.splitlines() if "balance_shim" in line]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert ["BALANCE_NPROCS" in lines[0], "starting 2 processes" in lines[1], len(lines)] == [True, True, 3]
    assert "cannot partition quantized weights" in lines[2]
