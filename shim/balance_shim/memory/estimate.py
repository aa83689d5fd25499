"""Estimate the activations of a block from its linear layers, for models or parts that cannot be traced."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..logits import chunks
from ..upstream import fused_head
from .blocks import Block
from .workload import Workload

if TYPE_CHECKING:
    from torch import Tensor

# A decoder layer keeps, for its backward pass, about the outputs of all its linear layers plus this many values of
# the hidden size a token (norms in float32, rotary embeddings, residuals). Fitted on a traced Llama-2-7B layer under
# sdpa attention: 46.5 bytes x tokens x hidden in bfloat16.
KEPT_HIDDEN_VALUES = 13
# The loss of causal models from full logits: a float32 copy, its log-softmax and its gradient live at once, beside
# the logits themselves. Traced: 12 bytes a logit at the peak of the backward pass with 2-byte logits.
LOSS_BYTES_PER_LOGIT = 10
# Adapters are supposed on every linear layer of the language model; PEFT's own default rank is 8, guides say 16.
LORA_RANK = 16
FLOAT32 = 4


@dataclass(frozen=True)
class Estimate:
    """The bytes that one block keeps from forward to backward, and those that it needs in addition while it runs."""

    kept: int = 0
    temporary: int = 0


def activations(block: Block, parameters: "Sequence[Tensor]", workload: Workload) -> Estimate:
    """Return the estimate for a block with these parameters."""
    matrices = [tensor for tensor in parameters if tensor.dim() == 2]
    if not matrices or block.role == "embedding":
        return Estimate()
    # Quantized weights are packed bytes; their activations are at least half precision.
    element = 2 if workload.autocast else max(2, min(FLOAT32, matrices[0].element_size()))
    if block.role == "head":
        vocabulary = max(max(tensor.shape) for tensor in matrices)
        if workload.loss == "chunked":
            rows = chunks.rows_in_chunk(workload.tokens, vocabulary, workload.tuning != "lora")
            if rows < workload.tokens:
                hidden = _hidden_size(matrices)
                return Estimate(workload.tokens * hidden * element, rows * vocabulary * chunks.BYTES_PER_LOGIT)
        if workload.loss == "fused":
            hidden = _hidden_size(matrices)
            return Estimate(workload.tokens * hidden * element, fused_head.tile_bytes(workload.tokens, element))
        logits = workload.tokens * vocabulary
        return Estimate(logits * element, logits * LOSS_BYTES_PER_LOGIT)
    hidden = _hidden_size(matrices)
    values = sum(max(1, tensor.shape[0]) for tensor in matrices) + KEPT_HIDDEN_VALUES * hidden
    size = workload.tokens * values * element
    if workload.gradient_checkpointing and block.role in ("layer", "tower"):
        return Estimate(workload.tokens * hidden * element, size)
    return Estimate(size)


def _hidden_size(matrices: "Sequence[Tensor]") -> int:
    """Return the size that most matrices have on a side, the smallest of several.

    The smallest of all is another one where queries are grouped: the width of all keys.
    """
    sides = Counter(side for tensor in matrices for side in tensor.shape)
    most = max(sides.values())
    return min(side for side, number in sides.items() if number == most)


def adapter_values(block: Block, parameters: "Sequence[Tensor]") -> int:
    """Return the number of values that adapters on all linear layers of a block have; only layers get adapters."""
    if block.role != "layer":
        return 0
    return LORA_RANK * sum(sum(tensor.shape) for tensor in parameters if tensor.dim() == 2)
