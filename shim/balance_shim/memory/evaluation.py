"""The workload of the evaluation that goes with a training."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

LABEL_BYTES = 8  # int64


@dataclass(frozen=True)
class Evaluation:
    """One evaluation's shape.

    Attributes:
        batch_size: sequences in a batch.
        seq_len: tokens in a row.
        returns: which of the model's outputs stay on the device where they return: "loss" (next to nothing), "logits"
            (all outputs but the loss and what the config leaves out), or "reduced" (a number or two per token, which
            `preprocess_logits_for_metrics` makes of them).
        accumulated_sequences: the outputs of so many sequences pile up there before they go to the host.
        joined: whether the accumulated outputs are one tensor that is allocated anew for each batch.
    """

    batch_size: int
    seq_len: int
    returns: Literal["loss", "logits", "reduced"] = "loss"
    accumulated_sequences: int = 1
    joined: bool = True

    def __str__(self) -> str:
        suffix = (
            f", kept for {self.accumulated_sequences} sequences" if self.returns != "loss" and self.piles_up else ""
        )
        return f"{self.batch_size} x {self.seq_len} tokens, {self.returns}{suffix}"

    @property
    def piles_up(self) -> bool:
        """Whether outputs of a batch are still there when the next one runs."""
        return self.accumulated_sequences > self.batch_size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def left_by_batch(self, outputs: int) -> int:
        """Return the bytes that each batch adds; `outputs` as in `piled_up`."""
        labels = self.seq_len * LABEL_BYTES * self.batch_size
        return (outputs if self.returns == "logits" else labels) + labels

    def piled_up(self, outputs: int) -> tuple[int, int]:
        """Return the bytes accumulated while the last batch runs, and the peak when its outputs have been added.

        Transformers' `EvalLoopContainer` holds the first outputs as they are and from then on a copy of all; the loop
        has those of the batch before in a variable as well.

        Args:
            outputs: bytes of the model's outputs for a batch, without the loss.
        """
        if self.returns == "loss":
            return 0, 0
        row = self.left_by_batch(outputs) / self.batch_size
        # While the last whole batch runs; one with fewer sequences behind it takes less.
        before = max(0, self.accumulated_sequences // self.batch_size - 1) * self.batch_size
        if not self.joined or not self.piles_up:
            return int(before * row), int(self.accumulated_sequences * row)
        batch_before = self.batch_size if before > self.batch_size else 0
        return int((before + batch_before) * row), int(2 * self.accumulated_sequences * row)
