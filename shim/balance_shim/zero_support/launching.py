"""Combinations of launchers, devices and required libraries."""

from .combination import Combination, Outcome

_RELAUNCH = "zero/test_relaunch.py::"
_SAVE_AS_SCRIPT = "cannot be run as several processes: save it as a script"


def _row(
    key: str, name: str, outcome: Outcome, proof: str, recognised: str, message: str = "", reason: str = ""
) -> Combination:
    return Combination(key, "Launching", name, outcome, proof, recognised, message, reason)


def _unrepeatable(key: str, name: str, recognised: str) -> Combination:
    proof = f"{_RELAUNCH}test_what_cannot_be_run_again_is_refused"
    return _row(key, name, "refused", proof, recognised, f"{name} {_SAVE_AS_SCRIPT}")


ROWS = (
    _row(
        "script", "a script, a module (`-m`) or a console program", "works",
        f"{_RELAUNCH}test_started_plainly_it_runs_twice",
        "no launcher's variables; it imports TrainingArguments or loads a model",
        reason="the process executes itself again under torch.distributed.run, once for each device or BALANCE_NPROC",
    ),
    _row(
        "torchrun", "torchrun, on one node or several", "works", "zero/test_training.py::test_two_nodes[torchrun]",
        "RANK, LOCAL_RANK, WORLD_SIZE or TORCHELASTIC_RUN_ID", reason="the ranks that are there are used",
    ),
    _row(
        "srun", "srun, on one node or several", "works", "zero/test_training.py::test_two_nodes[srun]",
        "SLURM_STEP_NUM_TASKS above 1", reason="SLURM's variables become those of torch.distributed",
    ),
    _row(
        "accelerate", "`accelerate launch`, with a DeepSpeed config of stage 3 or without", "works",
        "zero/test_launchers.py::test_trains_or_is_refused[accelerate, DeepSpeed config]", "the ranks' variables",
        reason="the launcher process is left alone; where it starts one process, that becomes several",
    ),
    _row(
        "trl", "TRL's commands (`trl sft`, `trl dpo`, `trl reward`)", "works",
        "zero/test_launchers.py::test_commands_of_trl", "`trl` is the program",
        reason="the launcher process is left alone, and the training that it starts becomes several processes",
    ),
    _row(
        "swift", "ms-swift's `swift sft`", "works", "end_to_end/test_swift.py::test_zero3_through_its_own_launcher",
        "`swift` is the program", reason="NPROC_PER_NODE is set for it",
    ),
    _row(
        "axolotl", "`axolotl train`, with accelerate (its default), torchrun or `--launcher python`", "works",
        "zero/test_launchers.py::test_command_of_axolotl", "`axolotl` is the program",
        reason="the launcher process is left alone; its config is given DeepSpeed while it saves, which all ranks do",
    ),
    _row(
        "sbatch", "sbatch without srun", "works", f"{_RELAUNCH}test_inside_another_launcher",
        "SLURM_PROCID without a step of several tasks",
        reason="the batch script is one process, which becomes several on its own node",
    ),
    _row(
        "gpus_per_task", "one visible device per rank (`srun --gpus-per-task=1`, containers)", "works",
        f"{_RELAUNCH}test_a_rank_that_sees_one_device_uses_that", "one visible device and a LOCAL_RANK above 0",
        reason="the rank uses the device that it sees",
    ),
    _row(
        "nproc_ignored", "BALANCE_NPROC under another launcher", "works with a note",
        f"{_RELAUNCH}test_a_number_of_processes_that_cannot_act_is_said", "LOCAL_WORLD_SIZE differs from BALANCE_NPROC",
        "BALANCE_NPROC={wanted} is ignored: a launcher has started {there} on this machine",
    ),
    _row(
        "launcher_trains", "a launcher that trains in its own process (LLaMA-Factory or axolotl with Ray)", "refused",
        "zero/test_support.py::test_refused[launcher_trains]", "a Trainer in a process that is no rank",
        "{program} makes a Trainer in its own process, which starts the ranks and is none of them; start its training "
        "by torchrun, or unset BALANCE_MODE",
    ),
    _row(
        "mpirun", "mpirun across nodes without MASTER_ADDR", "refused",
        f"{_RELAUNCH}test_ranks_of_mpi_without_an_address_are_told_what_to_set", "MPI's variables, no MASTER_ADDR",
        "rank {rank} of {size} does not know where the ranks meet; set MASTER_ADDR to the host of rank 0 (and "
        "MASTER_PORT to a free port of it)",
    ),
    _row(
        "ranks_above_devices", "a launcher that starts more processes than devices", "refused",
        f"{_RELAUNCH}test_more_ranks_than_devices_are_refused", "LOCAL_RANK beyond the devices",
        "the launcher has started {processes} processes or more on this machine, which has {devices} devices; start "
        "one process per device",
    ),
    _row(
        "nproc_above_devices", "BALANCE_NPROC above the number of devices", "refused",
        f"{_RELAUNCH}test_more_processes_than_devices_are_refused", "BALANCE_NPROC above the number of devices",
        "BALANCE_NPROC={count}, but there are {devices} devices, each for one process; set it to {devices} at most",
        "two processes on one device would each hold a full set of buffers, and NCCL refuses a device that is shared",
    ),
    _row(
        "cpu", "the CPU, with BALANCE_NPROC", "works",
        "zero/test_training.py::test_two_processes_learn_what_one_learns", "no accelerator",
        reason="gloo, for trying things out",
    ),
    _row(
        "no_accelerator", "the CPU, without BALANCE_NPROC", "refused",
        f"{_RELAUNCH}test_what_cannot_be_had_is_one_line[no device]", "no accelerator",
        "no accelerator here; BALANCE_NPROC=2 trains in 2 processes on the CPU",
    ),
    _row(
        "one_device", "one device", "refused", "zero/test_support.py::test_refused[one_device]",
        "one device, neither BALANCE_NPROC nor BALANCE_OFFLOAD",
        "one device only, so there is nothing to partition; unset BALANCE_MODE, or set BALANCE_NPROC=1 or "
        "BALANCE_OFFLOAD to use DeepSpeed all the same",
    ),
    _row(
        "simulated", "simulated devices", "refused", f"{_RELAUNCH}test_what_cannot_be_had_is_one_line[one device]",
        "BALANCE_SIMULATE",
        "ZeRO-3 does not run on simulated devices; unset BALANCE_SIMULATE and set BALANCE_NPROC "
        "to train in that many processes on the CPU",
    ),
    _unrepeatable("notebook", "a notebook", "ipykernel, IPython or jupyter is the program"),
    _unrepeatable("interactive", "an interactive prompt", "no program in sys.orig_argv"),
    _unrepeatable("standard_input", "a program from standard input", '"-" is the program'),
    _unrepeatable("python_c", "python -c", "-c"),
    _row(
        "no_port", "MASTER_PORT that is not a port", "refused",
        f"{_RELAUNCH}test_what_cannot_be_had_is_one_line[no port]", "MASTER_PORT",
        "MASTER_PORT={port!r} is not a port; unset it to have one chosen",
    ),
    _row(
        "port_in_use", "MASTER_PORT that is in use", "refused",
        f"{_RELAUNCH}test_what_cannot_be_had_is_one_line[port in use]", "binding the port fails",
        "port {port} of {host} cannot be used ({reason}); unset MASTER_PORT to have a free one chosen",
    ),
    _row(
        "library_missing", "DeepSpeed or accelerate not installed", "refused",
        f"{_RELAUNCH}test_what_cannot_be_had_is_one_line[DeepSpeed missing]", "the installed packages",
        "needs {library}, which is not installed (pip install -U '{library}>={oldest}')",
    ),
    _row(
        "library_too_old", "DeepSpeed before 0.16, accelerate before 1.0", "refused",
        f"{_RELAUNCH}test_what_cannot_be_had_is_one_line[DeepSpeed too old]", "the installed packages",
        "needs {library} {oldest} or newer; {version} is installed (pip install -U '{library}>={oldest}')",
    ),
    _row(
        "toolkit_missing", "DeepSpeed before 0.19.8 on CUDA without the toolkit", "refused",
        f"{_RELAUNCH}test_older_deepspeed_needs_the_toolkit_where_there_is_a_gpu",
        "a CUDA device, torch finds no CUDA_HOME",
        "deepspeed {version} needs the CUDA toolkit to be imported where there is a GPU, and finds none: pip install "
        "-U 'deepspeed>={enough}', or set CUDA_HOME to a toolkit",
    ),
)  # fmt: skip
