"""What the matrix holds: which trainings run in which environments, under which modes."""

from dataclasses import dataclass

TASKS = ("trainer", "clm", "seq2seq", "classification", "answers", "pictures", "sound")
EXAMPLES = ("run_clm", "run_classification", "run_qa")
TRL = ("sft", "sft_by_path", "dpo", "dpo_reference", "dpo_by_path", "reward", "kto", "grpo", "distillation")
PEFT = ("lora", "dora", "prompt", "p_tuning", "prefix", "modules_to_save", "trainable_tokens", "packed_experts")
SCRIPT_OF_EXAMPLES = "examples.py"  # needs a checkout of transformers
ALL = ("balanced", "map", "zero3", "replicas")
SHARED = ("balanced", "zero3", "replicas")
PLACED = ("balanced", "zero3")


@dataclass(frozen=True)
class Group:
    """Trainings of one script of `trainings/`.

    Attributes:
        library: as the table names it.
        script: its file.
        names: the trainings in it.
        environments: where they run.
        modes: under which they run, each beside a run without the shim.
    """

    library: str
    script: str
    names: tuple[str, ...]
    environments: tuple[str, ...]
    modes: tuple[str, ...]


OF_TRANSFORMERS = tuple(f"transformers-{version}" for version in ("4.45.2", "4.51.3", "4.57.6", "5.0.0", "5.24.0"))
OF_TRL = ("transformers-4.51.3", "transformers-4.57.6", "transformers-5.24.0")
OF_SWIFT = ("ms-swift-3.12.6", "ms-swift-4.6.0")
OLDEST_AND_NEWEST_PEFT = ("transformers-4.45.2", "transformers-5.24.0")
NEWEST = ("transformers-5.24.0",)

GROUPS = (
    Group("transformers", "tasks.py", TASKS, OF_TRANSFORMERS, ALL),
    Group("transformers' example scripts", SCRIPT_OF_EXAMPLES, EXAMPLES, OF_TRANSFORMERS, ALL),
    Group("TRL", "trl_trainers.py", TRL, OF_TRL, SHARED),
    Group("PEFT", "peft_methods.py", PEFT, OLDEST_AND_NEWEST_PEFT, PLACED),
    Group("ms-swift", "ms_swift.py", ("lora", "full", "dpo"), OF_SWIFT, ALL),
    Group("LLaMA-Factory", "llamafactory.py", ("lora", "full"), ("llamafactory-0.9.5",), SHARED),
    Group("others", "others.py", ("sentence_transformers", "setfit", "accelerate_loop"), NEWEST, PLACED),
    Group("quantized", "others.py", ("four_bits", "eight_bits", "torchao"), NEWEST, PLACED),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One mark of the matrix."""

    environment: str
    library: str
    script: str
    training: str
    mode: str


def cells(environments: list[str], trainings: list[str], modes: list[str]) -> list[Cell]:
    """Return all cells, or those of the environments, trainings and modes that are named, in the order they run."""
    return [
        Cell(environment, group.library, group.script, training, mode)
        for environment in dict.fromkeys(name for group in GROUPS for name in group.environments)
        for group in GROUPS
        for training in group.names
        for mode in group.modes
        if environment in group.environments
        and (not environments or environment in environments)
        and (not trainings or training in trainings or group.library in trainings)
        and (not modes or mode in modes)
    ]
