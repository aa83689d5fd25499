"""Trainers, loops of the script's own, what ranks have to do together, and files."""

from .combination import Area, Combination, Outcome

_REFUSED = "zero/test_support.py::test_refused"
_TRAINED = "zero/test_combinations.py::test_trained"
_FILES: Area = "Ranks and files"


def _row(area: Area, key: str, name: str, outcome: Outcome, proof: str, recognised: str = "", message: str = "",
         reason: str = "") -> Combination:  # fmt: skip
    return Combination(key, area, name, outcome, proof, recognised, message, reason)


ROWS = (
    _row(
        "Trainers", "trainer", "transformers' Trainer", "works",
        "zero/test_training.py::test_two_processes_learn_what_one_learns[plain_trainer.py]",
    ),
    _row("Trainers", "sft", "TRL's SFTTrainer", "works", f"{_TRAINED}[sft]"),
    _row("Trainers", "sft_path", "TRL's SFTTrainer with a model path", "works", f"{_TRAINED}[sft_path]"),
    _row("Trainers", "sft_lora", "TRL's SFTTrainer with LoRA", "works", f"{_TRAINED}[sft_lora]"),
    _row("Trainers", "dpo", "TRL's DPOTrainer", "works", f"{_TRAINED}[dpo]"),
    _row("Trainers", "dpo_lora", "TRL's DPOTrainer with LoRA", "works", f"{_TRAINED}[dpo_lora]"),
    _row("Trainers", "dpo_path", "TRL's DPOTrainer with a model path", "works", f"{_TRAINED}[dpo_path]"),
    _row("Trainers", "grpo", "TRL's GRPOTrainer", "works", f"{_TRAINED}[grpo]"),
    _row(
        "Trainers", "grpo_reward_model", "TRL's GRPOTrainer with a reward model", "works",
        f"{_TRAINED}[grpo_reward_model]",
    ),
    _row("Trainers", "rloo", "TRL's RLOOTrainer", "works", f"{_TRAINED}[rloo]"),
    _row(
        "Trainers", "rloo_checkpointing", "TRL's RLOOTrainer with gradient checkpointing", "works",
        f"{_TRAINED}[rloo_checkpointing]",
    ),
    _row("Trainers", "reward", "TRL's RewardTrainer", "works", f"{_TRAINED}[reward]"),
    _row(
        "Trainers", "two_trainers", "several trainers in one program", "works",
        "zero/test_training.py::test_two_trainers_one_of_which_evaluates_first",
    ),
    _row(
        "Loops", "accelerate_loop", "`Accelerator().prepare(...)`", "works",
        "zero/test_training.py::test_a_loop_of_the_scripts_own", "an Accelerator without a DeepSpeed plugin",
        reason="it gets DeepSpeed and the config",
    ),
    _row(
        "Loops", "clip_by_norm", "`accelerator.clip_grad_norm_` that the config does not know of", "refused",
        f"{_REFUSED}[clip_by_norm]", "`gradient_clipping` of the config differs from the script's",
        "the script clips gradients to {norm}, while DeepSpeed, which clips in its own step, has {configured} in its "
        "config; set BALANCE_ZERO_CONFIG='{{\"gradient_clipping\": {norm}}}'",
    ),
    _row(
        "Loops", "clip_by_value", "`accelerator.clip_grad_value_`", "refused", f"{_REFUSED}[clip_by_value]",
        "the call", "DeepSpeed cannot clip gradients by value; clip by norm instead",
    ),
    _row(
        "Loops", "bare_loop", "a bare torch loop, with DistributedDataParallel or without", "refused",
        f"{_REFUSED}[bare_loop]", "a partitioned model is called in training mode without an engine",
        "{model} is partitioned, and trains in a loop without a Trainer or `Accelerator().prepare(...)`, either of "
        "which gives it DeepSpeed's engine; use one, or unset BALANCE_MODE",
    ),
    _row(
        _FILES, "resumed", "resuming with the same number of processes", "works", f"{_TRAINED}[resumed]",
    ),
    _row(
        _FILES, "resumed_elsewhere", "resuming with another number of processes", "works",
        "zero/test_training.py::test_resuming_a_checkpoint[2]", "the number of shards in the checkpoint",
        reason="the checkpoint is converted once to DeepSpeed's universal format",
    ),
    _row(
        _FILES, "unconvertible", "resuming what cannot be converted", "refused", f"{_REFUSED}[unconvertible]",
        "DeepSpeed's conversion fails",
        "{folder} was written by {wrote} and cannot be converted for {processes} ({reason}); resume with "
        "BALANCE_NPROC={processes_then}",
    ),
    _row(
        _FILES, "own_folders", "folders that each rank makes for itself", "works",
        "zero/test_training.py::test_folders_that_a_script_makes_for_itself",
        reason="`output_dir`, `logging_dir` and `run_name` are the first rank's",
    ),
    _row(
        _FILES, "saved", "models that the Trainer or the script saves", "works",
        "zero/test_training.py::test_saved_model_loads_without_the_shim", reason="whole weights, written by rank 0",
    ),
    _row(
        _FILES, "one_rank_alone", "saving, merging, evaluating, calling, or reading by one rank alone", "refused",
        f"{_REFUSED}[one_rank_alone]", "the other ranks have not come to the same call in time",
        "rank {rank} came to {what}, and {why}: under ZeRO-3 each rank holds a part of the weights. {remedy}",
    ),
    _row(
        _FILES, "other_modules", "ranks that run different modules, other than towers and experts", "refused",
        "zero/test_ends.py::test_a_rank_that_skips_a_module_is_named", "the ranks' notes of a step differ",
        reason="the error names the ranks, the module, and the inputs that only one of them has",
    ),
)  # fmt: skip
