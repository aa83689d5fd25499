"""Other ways of spreading a model, DeepSpeed's own config, precision, and what a step does."""

from .combination import Combination, Outcome

_REFUSED = "zero/test_support.py::test_refused"
_TRAINED = "zero/test_combinations.py::test_trained"


def _row(
    key: str, name: str, outcome: Outcome, proof: str, recognised: str = "", message: str = "", reason: str = ""
) -> Combination:
    return Combination(key, "Configuration", name, outcome, proof, recognised, message, reason)


ROWS = (
    _row(
        "fsdp", "FSDP in the TrainingArguments", "refused", f"{_REFUSED}[fsdp]", "`TrainingArguments.fsdp`",
        "the script asks for FSDP (fsdp={value!r}), which partitions the weights in its place; remove it, or unset "
        "BALANCE_MODE",
    ),
    _row(
        "accelerate_launch", "FSDP, Megatron-LM or a parallelism config from `accelerate launch` or its config file",
        "refused", f"{_REFUSED}[accelerate_launch]", "ACCELERATE_USE_FSDP and its like",
        "accelerate has been started with {way} ({variable}), which spreads the model in its own way; start it "
        "without, or unset BALANCE_MODE",
    ),
    _row(
        "other_plugin", "FSDP or Megatron plugins of an Accelerator", "refused", f"{_REFUSED}[other_plugin]",
        "`fsdp_plugin`, `megatron_lm_plugin`",
        "the script gives its Accelerator a {plugin}; unset BALANCE_MODE",
    ),
    _row(
        "tensor_parallel", "tensor parallelism in `from_pretrained`", "refused", f"{_REFUSED}[tensor_parallel]",
        "`tp_plan`, `tp_size`, `device_mesh`, `distributed_config`",
        "{cls}.from_pretrained is asked for tensor parallelism ({name}), where DeepSpeed would partition the same "
        "weights again; remove it, or unset BALANCE_MODE",
    ),
    _row(
        "parallelism_config", "accelerate's `ParallelismConfig`", "refused", f"{_REFUSED}[parallelism_config]",
        "`parallelism_config` of TrainingArguments or Accelerator",
        "the script passes a parallelism_config, with which accelerate spreads the model in its own way; remove it, or "
        "unset BALANCE_MODE",
    ),
    _row(
        "other_stage", "a DeepSpeed config of another stage", "refused",
        "zero/test_relaunch.py::test_what_cannot_be_had_is_one_line[stage 2]", "`zero_optimization.stage`",
        "{source} asks for ZeRO stage {stage!r}, but BALANCE_MODE=zero3 is stage 3",
    ),
    _row(
        "own_config", "a DeepSpeed config of the script, or of `accelerate launch`", "works with a note",
        "zero/test_config.py::test_the_users_config_wins_key_by_key", "`TrainingArguments.deepspeed`, "
        "ACCELERATE_DEEPSPEED_CONFIG_FILE", "your DeepSpeed config takes precedence; added to it: {added}",
    ),
    _row(
        "offload", "BALANCE_OFFLOAD=optimizer and =all", "works",
        "zero/test_training.py::test_a_teacher_offloading_and_what_the_variables_say", "BALANCE_OFFLOAD",
        reason="torch's optimizer steps on the host; DeepSpeed's own would have to be compiled",
    ),
    _row("full", "float32, AdamW", "works", f"{_TRAINED}[full]"),
    _row("bf16", "`bf16=True`", "works", f"{_TRAINED}[bf16]", reason="DeepSpeed keeps float32 master weights"),
    _row("compiled", "`torch_compile=True`", "works", f"{_TRAINED}[compiled]"),
    _row("checkpointing", "gradient checkpointing", "works", f"{_TRAINED}[checkpointing]"),
    _row("accumulation", "gradient accumulation", "works", f"{_TRAINED}[accumulation]"),
    _row("group_by_length", "batches grouped by length", "works", f"{_TRAINED}[group_by_length]"),
    _row(
        "auto_batch", "`auto_find_batch_size=True`", "refused", f"{_REFUSED}[auto_batch]",
        "`TrainingArguments.auto_find_batch_size`",
        "auto_find_batch_size is not supported with ZeRO-3, whose engine is built for one batch size; set "
        "per_device_train_batch_size",
    ),
    _row(
        "matrix_optimizer", "optimizers that look at the shape of a weight (Adafactor, GaLore, APOLLO, Muon, Shampoo)",
        "works with a note", f"{_TRAINED}[adafactor]", "the class name of the optimizer",
        "{optimizer} uses the rows and columns of a weight, but ZeRO-3 hands it flat pieces of the weights: training "
        "differs from that of one process. AdamW, SGD and others that work element by element are exact",
    ),
)  # fmt: skip
