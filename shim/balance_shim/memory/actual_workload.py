"""The workload as a Trainer really has it: its arguments, what trains in its model, how long its rows are."""

import sys
from dataclasses import replace
from itertools import islice
from typing import Any

from .workload import Workload, from_arguments

ROWS_READ = 256  # enough to see the longest rows of most data sets, and read in milliseconds


def actual_workload(trainer: Any, assumed: Workload) -> Workload:
    """Return the workload of a `transformers.Trainer` that has been made; `assumed` where it cannot be told."""
    known = from_arguments(trainer.args)
    known["tuning"] = tuning(trainer.model)
    rows = longest_row(trainer.train_dataset)
    if rows is not None:
        known["seq_len"] = rows
    return replace(assumed, **known, guessed=assumed.guessed and "seq_len" not in known)


def tuning(model: Any) -> str:
    """Return "full", "lora" or "frozen" by which parameters of `model` train."""
    trained = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    if all(trains for _, trains in trained):
        return "full"
    return "lora" if any("lora_" in name or "adapter" in name for name, trains in trained if trains) else "frozen"


def longest_row(dataset: Any) -> int | None:
    """Return the most tokens in the first rows of a tokenized data set; None where looking could have an effect.

    Only lists and plain `datasets.Dataset`s are read. Any other data set may augment at random, download or count
    when it is asked for a row, and training must not notice that somebody looked.
    """
    library = sys.modules.get("datasets")
    if library is not None and isinstance(dataset, library.Dataset):
        if "input_ids" not in dataset.column_names or dataset.format["type"] == "custom":
            return None
        # One column only: decoding pictures would take long.
        rows = dataset.select_columns(["input_ids"]).with_format(None)[: min(ROWS_READ, len(dataset))]["input_ids"]
    elif isinstance(dataset, list):
        rows = [row["input_ids"] for row in islice(dataset, ROWS_READ) if isinstance(row, dict) and "input_ids" in row]
    else:
        return None
    lengths = [len(row) for row in rows if hasattr(row, "__len__")]
    return max(lengths, default=0) or None
