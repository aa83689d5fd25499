"""Which rank of its machine a process is, as launchers tell, and where nobody shares devices."""

import pytest

from balance_shim.replicas import links, ranks
from balance_shim.replicas.ranks import LocalRank

SRUN = {"SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}
ENVIRONMENTS = {
    "torchrun": ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8", "RANK": "5"}, LocalRank(1, 2)),
    "deepspeed": ({"LOCAL_RANK": "3", "LOCAL_SIZE": "4", "WORLD_SIZE": "4"}, LocalRank(3, 4)),
    "Open MPI": ({"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, LocalRank(0, 2)),
    "MVAPICH2": ({"MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2"}, LocalRank(1, 2)),
    "Intel MPI": ({"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, LocalRank(1, 2)),
    "srun": (SRUN, LocalRank(1, 3)),
    "sbatch": ({"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4"}, None),
    "ranks only": ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, LocalRank(1, 2)),
    "no launcher": ({"WORLD_SIZE": "1"}, None),
    "nonsense": ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "two"}, None),
    "odd tasks": ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"}, None),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_launcher_says_so_in_variables_of_its_own(name):
    """Local rank and number of local ranks; None where a process is one of none."""
    environ, expected = ENVIRONMENTS[name]
    assert ranks.local_rank(environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({"WORLD_SIZE": "4"}, 4), ({"_PATCH_WORLD_SIZE": "2"}, 2), ({}, 1), ({"WORLD_SIZE": "x"}, 1)],
)
def test_world_size(environ, expected):
    """Also while ms-swift has taken the variable away."""
    assert ranks.world_size(environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_GPUS_PER_TASK": "2"}, True),
        ({"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu:2"}, True),
        ({"SLURM_TRES_PER_TASK": "cpu=4"}, False),
        ({"SLURM_GPUS_PER_TASK": ""}, False),
        ({}, False),
    ],
)
def test_tasks_that_see_devices_of_their_own(environ, expected):
    """SLURM gives each task its devices if asked to; there is nothing to divide then."""
    assert ranks.sees_own_devices(environ) is expected


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_other_ways_to_spread_a_model_are_left_alone(name, monkeypatch):
    """Ranks of FSDP or DeepSpeed share models, so none of them has devices of its own."""
    environ, _ = ENVIRONMENTS["torchrun"]
    for variable, value in {**environ, name: "true"}.items():
        monkeypatch.setenv(variable, value)
    assert ranks.own_share() is None and not ranks.has_own_devices()


class FakeLinks:
    """Links as the driver tells them: devices 0 and 1 are connected, and 2 and 3."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __getitem__(self, row):
        return [int(frozenset((row, column)) in self.pairs) for column in range(4)]


def test_links_count_if_not_all_devices_have_them(monkeypatch):
    """The matrix is torch's; without it, or with links between all devices, there are none to follow."""
    pairs = {frozenset((0, 1)), frozenset((2, 3))}
    monkeypatch.setattr(links.devices, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(links, "_nvlinks", lambda: FakeLinks(pairs))
    assert links.fast_links((0, 1, 2, 3)) == pairs and links.fast_links((0, 1)) == frozenset()

    def fails():
        raise RuntimeError("no detector")

    monkeypatch.setattr(links, "_nvlinks", fails)
    assert links.fast_links((0, 1, 2, 3)) == frozenset()
