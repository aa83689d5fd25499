"""The actual workload of a Trainer: its arguments, the trained parameters of its model, its longest batch."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from .. import state
from ..choices import Tuning
from ..memory import sequence_length
from ..memory.recomputation import is_supported
from ..memory.workload import Workload, from_arguments
from ..placement import placed_models
from ..upstream import fused_head
from ..upstream.trainer import TrainerLike
from . import chunked_loss, in_flight
from .longest_batch import longest_batch, shortest_length

if TYPE_CHECKING:
    from torch import nn

KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")  # PEFT's kinds of prompts that are no tokens


def actual_workload(
    trainer: TrainerLike, assumed: Workload, batch: Mapping[str, Any] | None = None
) -> tuple[Workload, Mapping[str, Any] | None]:
    """Return the workload of a `transformers.Trainer` that is about to train, and the largest batch that can be seen.

    Args:
        batch: one that has been seen; None: what the collator makes of the longest items, or nothing where looking
            could have an effect. The sequence length is then the most that the trainer lets through, if it limits it.
    """
    fields = from_arguments(trainer.args)
    longest = sequence_length.of_trainer(trainer)
    if longest is not None and not state.settings().seq_len:
        fields.setdefault("seq_len", longest)
    fields["replicated"] = _has_buckets(trainer)
    fields["tuning"] = tuning(trainer.model)
    fields["in_flight"], fields["shares_inputs"] = in_flight.of(trainer), state.settings().pipeline != "off"
    fields |= trained_ahead(trainer.model)
    setting = state.settings().gradient_checkpointing
    if isinstance(setting, bool):
        fields["gradient_checkpointing"] = setting and is_supported(innermost(trainer.model))
    else:
        fields["gradient_checkpointing"] |= checkpoints_already(trainer.model)
    if batch is None:
        batch = longest_batch(trainer, fields["batch_size"])
    # A trainer whose batches have no labels reads the logits itself.
    labelled = batch is None or chunked_loss.has_labels(batch)
    fused = fused_head.of(innermost(trainer.model)) is not None
    chunked = not fused and labelled and chunked_loss.wanted(trainer, placed=True)
    fields["loss"] = "fused" if fused else "chunked" if chunked else "full"
    ids: Any = None if batch is None else batch.get("input_ids")
    if hasattr(ids, "shape") and len(ids.shape) == 2:
        fields["batch_size"], fields["seq_len"] = map(int, ids.shape)
        fields["shortest"] = shortest_length(trainer.train_dataset)
    guessed = assumed.guessed and "seq_len" not in fields and batch is None
    workload = replace(assumed, **fields, guessed=guessed)
    return workload, batch


def _has_buckets(trainer: TrainerLike) -> bool:
    """Whether DDP will keep buckets besides the gradients: unless its `gradient_as_bucket_view` is asked for."""
    options = getattr(getattr(trainer, "accelerator", None), "ddp_handler", None)
    return bool(trainer.args.world_size > 1 and not getattr(options, "gradient_as_bucket_view", False))


def tuning(model: "nn.Module") -> Tuning:
    """Return "full", "lora" or "frozen" by which parameters of `model` train."""
    trained = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    if all(trains for _, trains in trained):
        return "full"
    return "lora" if any("lora_" in name or "adapter" in name for name, trains in trained if trains) else "frozen"


def trained_ahead(model: "nn.Module") -> dict[str, Any]:
    """Return the fields of a `Workload` on modules that train ahead of the model that was placed inside of `model`."""
    config: Any = getattr(model, "active_peft_config", None) if hasattr(model, "get_base_model") else None
    if getattr(config, "is_prompt_learning", False):
        tokens = int(getattr(config, "num_virtual_tokens", None) or 0)
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        return {"prefix_tokens" if kind in KEYS_AND_VALUES else "prompt_tokens": tokens}
    placed = placed_models.placed(model)
    if placed is None or placed[0] is model:
        return {}
    inside = {id(parameter) for parameter in placed[0].parameters()}
    # In the order in which a script has made them, which is that of its forward pass as a rule.
    ahead = takewhile(lambda parameter: id(parameter) not in inside, model.parameters())
    return {"trains_ahead": any(parameter.requires_grad for parameter in ahead)}


def checkpoints_already(model: "nn.Module") -> bool:
    """Whether `model` recomputes activations in its backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def innermost(model: Any) -> Any:
    """Return the library's model inside of PEFT's, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
