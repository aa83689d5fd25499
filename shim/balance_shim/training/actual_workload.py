"""The workload as a Trainer really has it: its arguments, what trains in its model, its longest batch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import state
from ..memory import sequence_length
from ..memory.recomputation import is_supported
from ..memory.workload import Workload, from_arguments
from . import chunked_loss
from .longest_batch import longest_batch


def actual_workload(
    trainer: Any, assumed: Workload, batch: Mapping[str, Any] | None = None
) -> tuple[Workload, Mapping[str, Any] | None]:
    """Return the workload of a `transformers.Trainer` that is about to train, and the largest batch that can be seen.

    Args:
        batch: one that has been seen; None: what the collator makes of the longest items, or nothing where looking
            could have an effect. The sequence length is then the most that the trainer lets through, if it limits it.
    """
    known = from_arguments(trainer.args)
    longest = sequence_length.of_trainer(trainer)
    if longest is not None and not state.settings().seq_len:
        known.setdefault("seq_len", longest)
    known["tuning"] = tuning(trainer.model)
    wish = state.settings().gradient_checkpointing
    if isinstance(wish, bool):
        known["gradient_checkpointing"] = wish and is_supported(innermost(trainer.model))
    else:
        known["gradient_checkpointing"] |= checkpoints_already(trainer.model)
    if batch is None:
        batch = longest_batch(trainer, known["batch_size"])
    # A trainer whose batches have no labels reads the logits itself.
    labelled = batch is None or chunked_loss.has_labels(batch)
    known["loss"] = "chunked" if labelled and chunked_loss.wanted(trainer, placed=True) else "full"
    ids: Any = None if batch is None else batch.get("input_ids")
    if hasattr(ids, "shape") and len(ids.shape) == 2:
        known["batch_size"], known["seq_len"] = map(int, ids.shape)
    guessed = assumed.guessed and "seq_len" not in known and batch is None
    workload = replace(assumed, **known, guessed=guessed)
    return workload, batch


def tuning(model: Any) -> str:
    """Return "full", "lora" or "frozen" by which parameters of `model` train."""
    trained = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    if all(trains for _, trains in trained):
        return "full"
    return "lora" if any("lora_" in name or "adapter" in name for name, trains in trained if trains) else "frozen"


def checkpoints_already(model: Any) -> bool:
    """Whether `model` recomputes activations in its backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def innermost(model: Any) -> Any:
    """Return the library's model inside of PEFT's, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
