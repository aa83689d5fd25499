"""The workload: everything about a training, other than the model, that decides how much memory it takes."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..settings import Settings

DEFAULT_SEQUENCE_LENGTH = 2048


@dataclass(frozen=True)
class Workload:
    """One training's shape.

    Attributes:
        batch_size: rows in a micro-batch on one device map.
        seq_len: tokens a row.
        accumulation: micro-batches before an optimizer step.
        tuning: what trains: "full", "lora" or "frozen" (everything but towers).
        optimizer: as in `TrainingArguments(optim=...)`.
        gradient_checkpointing: whether layers are recomputed in the backward pass.
        autocast: whether matrix products run in a lower precision than the weights are held in.
    """

    batch_size: int = 1
    seq_len: int = DEFAULT_SEQUENCE_LENGTH
    accumulation: int = 1
    tuning: str = "full"
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    autocast: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.batch_size * self.seq_len

    def differences(self, other: "Workload") -> dict[str, tuple[Any, Any]]:
        """Return {field: (ours, theirs)} for each field in which the two differ."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def describe(self) -> str:
        """Return one line for people: "full, adamw_torch, 1 x 2048 tokens, accumulation 1"."""
        extra = ", checkpointing" if self.gradient_checkpointing else ""
        return (
            f"{self.tuning}, {self.optimizer}, {self.batch_size} x {self.seq_len} tokens, "
            f"accumulation {self.accumulation}{extra}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def assume(settings: Settings, arguments: Any | None = None, longest: int | None = None) -> Workload:
    """Return the workload to plan for while the Trainer is not there yet.

    Args:
        settings: what the user said (`BALANCE_BATCH_SIZE`, ...); goes before everything else.
        arguments: the script's `TrainingArguments`, if it has made them already.
        longest: the most positions that the model takes, which bounds the default sequence length.
    """
    known = from_arguments(arguments) if arguments is not None else {}
    if longest is not None and "seq_len" not in known:
        known["seq_len"] = min(DEFAULT_SEQUENCE_LENGTH, longest)
    for field in ("batch_size", "seq_len", "tuning", "optimizer"):
        said = getattr(settings, field)
        if said is not None:
            known[field] = said
    return Workload(**known)


def from_arguments(arguments: Any) -> dict[str, Any]:
    """Return the fields of a `Workload` that a `transformers.TrainingArguments` (or a subclass of it) decides."""
    known: dict[str, Any] = {
        "batch_size": int(arguments.per_device_train_batch_size),
        "accumulation": int(arguments.gradient_accumulation_steps),
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "gradient_checkpointing": bool(arguments.gradient_checkpointing),
        "autocast": bool(arguments.bf16 or arguments.fp16),
    }
    # TRL names the cut-off `max_length` (`max_seq_length` before 0.16); plain TrainingArguments have none.
    longest = getattr(arguments, "max_length", None) or getattr(arguments, "max_seq_length", None)
    if isinstance(longest, int) and longest > 0:
        known["seq_len"] = longest
    return known
