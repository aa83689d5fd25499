"""Where scripts, trainers and tokenizers keep the longest sequence that they let through, in tokens."""

from typing import Any

from ..upstream.trainer import TrainerLike, TrainingArgumentsLike

# In `TrainingArguments` and classes derived from it: TRL (`max_length`; `max_seq_length` before 0.16), scripts in the
# manner of Alpaca and FastChat (`model_max_length`), run_clm.py and its descendants (`block_size`), LLaMA-Factory
# (`cutoff_len`), axolotl (`sequence_len`).
ATTRIBUTES = (
    "max_length",
    "max_seq_length",
    "max_seq_len",
    "model_max_length",
    "cutoff_len",
    "block_size",
    "seq_length",
    "sequence_len",
)
MOST = 1 << 24  # tokenizers without a limit have one of 10**30
# TRL's trainers of prompts with completions, where no `max_length` cuts the two together.
PROMPT, COMPLETION = "max_prompt_length", "max_completion_length"


def of_arguments(arguments: "TrainingArgumentsLike | TrainerLike") -> int | None:
    """Return the longest sequence that `TrainingArguments` of any class, or old trainers of TRL, let through.

    None if they do not tell.

    The first attribute that is set counts: TRL keeps deprecated names, unset, next to those in use.
    """
    length = next((length for name in ATTRIBUTES if (length := _length(getattr(arguments, name, None)))), None)
    prompt, completion = (_length(getattr(arguments, name, None)) for name in (PROMPT, COMPLETION))
    return prompt + completion if length is None and prompt and completion else length


def of_trainer(trainer: TrainerLike) -> int | None:
    """Return the longest sequence that `trainer` lets through, by itself and its tools; None if they do not tell.

    ms-swift keeps it in `trainer.template`, TRL up to 0.2x in the trainer itself, collators that pad to a fixed length
    in the collator. A tokenizer counts where it was last used with truncation: its `model_max_length` alone limits
    nothing.
    """
    template = getattr(trainer, "template", None)
    longest = _length(getattr(template, "max_length", None)) or of_arguments(trainer)
    longest = longest or _of_collator(getattr(trainer, "data_collator", None))
    if longest or getattr(trainer.args, COMPLETION, None):  # of prompts, to which completions are added
        return longest
    return _of_tokenizer(_tokenizer(trainer))


def _of_collator(collator: Any) -> int | None:
    fixed = getattr(collator, "padding", None) == "max_length" or getattr(collator, "pad_to_max_length", False) is True
    return _length(getattr(collator, "max_length", None)) if fixed else None


def _tokenizer(trainer: TrainerLike) -> Any:
    # `trainer.tokenizer` warns from 4.46 on, where `processing_class` has come.
    processing = vars(trainer).get("processing_class", vars(trainer).get("tokenizer"))
    return getattr(processing, "tokenizer", processing)


def _of_tokenizer(tokenizer: Any) -> int | None:
    truncation = getattr(getattr(tokenizer, "_tokenizer", None), "truncation", None)
    return _length(truncation.get("max_length")) if isinstance(truncation, dict) else None


def _length(value: Any) -> int | None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return value if is_integer and 0 < value < MOST else None
