"""The workload: all properties of a training, other than the model, that determine its memory."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..choices import Loss, Tuning
from ..language.message import Message
from ..settings import Settings
from ..upstream import fused_head
from ..upstream.trainer import TrainingArgumentsLike
from . import sequence_length
from .evaluation import Evaluation

DEFAULT_SEQUENCE_LENGTH = 2048


@dataclass(frozen=True)
class Workload:
    """One training's shape.

    Attributes:
        batch_size: rows in a micro-batch on one device map.
        seq_len: tokens a row.
        accumulation: micro-batches before an optimizer step.
        tuning: which parameters train: "full", "lora" or "frozen" (everything but towers).
        optimizer: as in `TrainingArguments(optim=...)`.
        gradient_checkpointing: whether layers are recomputed in the backward pass.
        loss: "chunked" where the head runs chunk by chunk (see `logits`), "fused" where TRL's head does (see
            `upstream.fused_head`), or "full".
        autocast: whether matrix products run in a lower precision than the weights are held in.
        autocast_dtype: that precision, "bfloat16" or "float16": before compute capability 8.0 fused attention takes
            the latter only.
        label_smoothing: the factor with which the Trainer, and not the model, computes the loss; 0 for none.
        evaluation: the evaluation between its steps; None: there is none, or nothing is known of it.
        prompt_tokens: virtual tokens in front of each row (PEFT's prompt tuning and p-tuning).
        prefix_tokens: tokens for which each layer gets trained keys and values (prefix tuning).
        trains_ahead: whether something outside of the model trains and runs ahead of it, so that gradients pass through
            all of its layers.
        in_flight: how many micro-batches go forward before the first of them goes backward; at most `accumulation`.
        shares_inputs: whether an input of several layers crosses to each device once, and not for each layer.
        replicated: whether DDP adds up the gradients of several replicas, in buckets of its own.
        shortest: tokens of the shortest sequence that was seen, 0 if unknown. Lengths that vary fragment memory.
        guessed: whether the sequence length is still unknown, which decides more than anything else.
    """

    batch_size: int = 1
    seq_len: int = DEFAULT_SEQUENCE_LENGTH
    accumulation: int = 1
    tuning: Tuning = "full"
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    autocast: bool = False
    autocast_dtype: str = "bfloat16"
    loss: Loss = "full"
    label_smoothing: float = 0.0
    evaluation: Evaluation | None = None
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    trains_ahead: bool = False
    in_flight: int = 1
    shares_inputs: bool = False
    replicated: bool = False
    shortest: int = field(default=0, compare=False)
    guessed: bool = field(default=False, compare=False)

    @property
    def least(self) -> float:
        """The length of the shortest sequences as a fraction of the longest; 1 if lengths are not known to vary."""
        return min(1.0, self.shortest / self.seq_len) if self.shortest else 1.0

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.batch_size * self.seq_len

    def differences(self, other: "Workload") -> dict[str, tuple[Any, Any]]:
        """Return {field: (ours, theirs)} for each field in which the two differ."""
        compared = [entry.name for entry in fields(self) if entry.compare]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in compared}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def describe(self) -> str:
        """Return one line for people: "full, adamw_torch, 1 x 2048 tokens, accumulation 1"."""
        return Message(
            "{tuning}, {optimizer}, {batch_size} x {seq_len} tokens, accumulation {accumulation}{in_flight}{extra}",
            tuning=self.tuning,
            optimizer=self.optimizer,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            accumulation=self.accumulation,
            in_flight=Message(" with {count} in flight", count=self.in_flight) if self.in_flight > 1 else "",
            extra=Message(", checkpointing") if self.gradient_checkpointing else "",
        )

    def traced(self) -> "Workload":
        """Return the workload as one micro-batch shows it: what depends on several at a time is composed afterwards."""
        return replace(self, in_flight=1, shares_inputs=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def assume(
    settings: Settings,
    arguments: TrainingArgumentsLike | None = None,
    longest: int | None = None,
    replicated: bool = False,
) -> Workload:
    """Return the workload to plan for while the Trainer is not there yet.

    Args:
        settings: the user's (`BALANCE_BATCH_SIZE`, ...); they override everything else.
        arguments: the script's `TrainingArguments`, if it has made them already.
        longest: the most positions that the model takes, which bounds the default sequence length.
        replicated: whether the model is one of several replicas.
    """
    values = from_arguments(arguments) if arguments is not None else {}
    for name in ("batch_size", "seq_len", "tuning", "optimizer"):
        setting = getattr(settings, name)
        if setting is not None:
            values[name] = setting
    if isinstance(settings.gradient_checkpointing, bool):
        values["gradient_checkpointing"] = settings.gradient_checkpointing
    if settings.precision is not None:
        values["autocast"] = settings.precision != "fp32"
        values["autocast_dtype"] = "float16" if settings.precision == "fp16" else "bfloat16"
    if settings.loss != "full":
        values.setdefault("loss", "chunked")
    if settings.pipeline != "off":
        values["shares_inputs"] = True
    if isinstance(settings.pipeline, int):
        values["in_flight"] = in_equal_chunks(settings.pipeline, values.get("accumulation", 1))
    guessed = "seq_len" not in values
    if guessed and longest is not None:
        values["seq_len"] = min(DEFAULT_SEQUENCE_LENGTH, longest)
    return Workload(**values, replicated=replicated, guessed=guessed)


def in_equal_chunks(count: int, accumulation: int) -> int:
    """Return the size of the fewest nearly equal chunks of `accumulation` with at most `count` micro-batches each."""
    chunks = -(-accumulation // count)
    return -(-accumulation // chunks)


def sizes_of_chunks(accumulation: int) -> list[int]:
    """Return the sizes that chunks of `accumulation` micro-batches may have, the largest first."""
    return sorted({in_equal_chunks(count, accumulation) for count in range(1, accumulation + 1)}, reverse=True)


def from_arguments(arguments: TrainingArgumentsLike) -> dict[str, Any]:
    """Return the fields of a `Workload` that a `transformers.TrainingArguments` (or a subclass of it) decides."""
    values: dict[str, Any] = {
        "batch_size": int(arguments.per_device_train_batch_size),
        "accumulation": int(arguments.gradient_accumulation_steps),
        "optimizer": str(getattr(arguments.optim, "value", arguments.optim)),
        "gradient_checkpointing": bool(arguments.gradient_checkpointing),
        "autocast": bool(arguments.bf16 or arguments.fp16),
        "autocast_dtype": "float16" if arguments.fp16 and not arguments.bf16 else "bfloat16",
        "label_smoothing": float(getattr(arguments, "label_smoothing_factor", 0) or 0),
    }
    if any(getattr(arguments, name, None) for name in ("torch_compile", "deepspeed", "fsdp")):
        values["loss"] = "full"
    elif fused_head.is_used_with(arguments):
        values["loss"] = "fused"
    longest = sequence_length.of_arguments(arguments)
    if longest is not None:
        values["seq_len"] = longest
    return values


def longest_row(config: Any) -> int | None:
    """Return the most positions that a model of `config` takes, as far as it has them."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
