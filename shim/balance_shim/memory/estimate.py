"""The bytes that each block takes while training: a first estimate, from shapes alone.

Weights, gradients and optimizer state are counted exactly. Activations and logits follow from the sizes of the linear
layers with constants that were fitted once; the constants stand here, each with its source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .blocks import Block
from .ties import tied_groups
from .workload import Workload

if TYPE_CHECKING:
    from torch import Tensor, nn

# A decoder layer keeps, for its backward pass, about the outputs of all its linear layers plus this many values of
# the hidden size a token (norms in float32, rotary embeddings, residuals). Fitted on a traced Llama-2-7B layer under
# sdpa attention: 46.5 bytes x tokens x hidden in bfloat16.
KEPT_HIDDEN_VALUES = 13
# The loss of causal models from full logits: a float32 copy, its log-softmax and its gradient live at once, beside
# the logits themselves. Traced: 12 bytes a logit at the peak of the backward pass with 2-byte logits.
LOSS_BYTES_PER_LOGIT = 10
# Adapters are assumed as PEFT makes them by default: rank 8 would be its own default, 16 is what guides recommend.
LORA_RANK = 16
FLOAT32 = 4

# Optimizer -> (state tensors a parameter, bytes of each value; None: as wide as the parameter).
# A name that is not here is taken for AdamW, the default and the largest of the common ones.
_STATE: dict[str, tuple[float, float | None]] = {
    "sgd": (0, None), "rmsprop": (1, None), "adagrad": (1, None), "lion": (1, None), "lion_32bit": (1, FLOAT32),
    "adafactor": (0.01, FLOAT32), "adamw_8bit": (2, 1.03), "adamw_bnb_8bit": (2, 1.03), "lion_8bit": (1, 1.03),
    # Paged state lives in host memory and visits the device.
    "paged_adamw": (0, None), "paged_adamw_32bit": (0, None), "paged_adamw_8bit": (0, None),
    "paged_lion": (0, None), "paged_lion_32bit": (0, None), "paged_lion_8bit": (0, None),
}  # fmt: skip
_ADAMW = (2.0, None)

TERMS = ("weights", "gradients", "optimizer", "activations", "temporary", "overhead")


@dataclass(frozen=True)
class BlockCost:
    """What one block takes, in bytes.

    Attributes:
        weights: parameters and buffers as they are loaded.
        gradients: one for each parameter that trains.
        optimizer: state that the optimizer keeps between steps.
        activations: kept from the block's forward pass to its backward pass.
        temporary: the most that exists beside all that while the block runs.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporary: int = 0

    def __add__(self, other: "BlockCost") -> "BlockCost":
        """Return the cost of both on one device: temporaries do not live at the same time."""
        return BlockCost(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.activations + other.activations,
            max(self.temporary, other.temporary),
        )


def estimate(
    model: "nn.Module",
    blocks: tuple[Block, ...],
    workload: Workload,
    parameter_bytes: Callable[[str, "Tensor"], float] | None = None,
    trains: Callable[[str, "Tensor"], bool] | None = None,
) -> tuple[BlockCost, ...]:
    """Return the cost of each block, in the order of `blocks`. A tied parameter is counted where it comes first, be it
    tied already or only announced to be.

    Args:
        model: the model that `blocks` was made from, on any device, the meta device included.
        workload: what to train with.
        parameter_bytes: the bytes of a whole parameter as it will be loaded; by default as it is now. Quantizers
            know better (see `seams/weight_sizes.py`).
        trains: which parameters get gradients; by default what `workload.tuning` supposes. Where it is given, adapters
            are parameters of the model already and none are supposed.
    """
    size_of = parameter_bytes or (lambda name, tensor: tensor.numel() * tensor.element_size())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    identity = {name: -1 - number for number, group in enumerate(tied_groups(model)) for name in group}
    seen: set[int] = set()
    costs = []
    for block in blocks:
        tensors = {name: parameters[name] for name in block.parameters}
        own = {}
        for name, tensor in tensors.items():
            key = identity.get(name, id(tensor))
            if key not in seen:
                seen.add(key)
                own[name] = tensor
        weights = sum(size_of(name, tensor) for name, tensor in own.items())
        weights += sum(buffers[name].numel() * buffers[name].element_size() for name in block.buffers)
        if trains is None:
            gradients, optimizer = _supposed_training_bytes(block, own, workload)
        else:
            gradients, optimizer = _training_bytes([own[name] for name in own if trains(name, own[name])], workload)
        activations, temporary = _activation_bytes(block, tensors, workload)
        costs.append(BlockCost(int(weights), int(gradients), int(optimizer), int(activations), int(temporary)))
    return tuple(costs)


def returned_bytes(blocks: tuple[Block, ...], costs: tuple[BlockCost, ...]) -> int:
    """Return the bytes of the outputs that accelerate copies to the first device when the head is on another one."""
    return sum(cost.activations for block, cost in zip(blocks, costs, strict=True) if block.role == "head")


def _supposed_training_bytes(
    block: Block, parameters: Mapping[str, "Tensor"], workload: Workload
) -> tuple[float, float]:
    """Return (gradients, optimizer state) of one block for what `workload.tuning` supposes to train."""
    if workload.tuning == "lora":
        tensors, width = _STATE.get(workload.optimizer, _ADAMW)
        sides = [sum(tensor.shape) for tensor in parameters.values() if tensor.dim() == 2]
        values = LORA_RANK * sum(sides) if block.role == "layer" else 0
        return values * FLOAT32, values * tensors * (width or FLOAT32)
    if workload.tuning == "frozen" and block.role == "tower":
        return 0, 0
    return _training_bytes([tensor for tensor in parameters.values() if tensor.is_floating_point()], workload)


def _training_bytes(trained: list["Tensor"], workload: Workload) -> tuple[float, float]:
    """Return (gradients, optimizer state) of the parameters that train."""
    tensors, width = _STATE.get(workload.optimizer, _ADAMW)
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in trained)
    return gradients, sum(tensor.numel() * tensors * (width or tensor.element_size()) for tensor in trained)


def _activation_bytes(block: Block, parameters: Mapping[str, "Tensor"], workload: Workload) -> tuple[float, float]:
    """Return (kept for backward, temporary) of one block."""
    matrices = [tensor for tensor in parameters.values() if tensor.dim() == 2]
    if not matrices:
        return 0, 0
    # Quantized weights are packed bytes; their activations are at least half precision.
    element = max(2, min(FLOAT32, matrices[0].element_size()))
    if workload.autocast:
        element = 2
    if block.role == "head":
        logits = workload.tokens * max(max(tensor.shape) for tensor in matrices)
        return logits * element, logits * LOSS_BYTES_PER_LOGIT
    if block.role == "embedding":
        return 0, 0
    hidden = min(min(tensor.shape) for tensor in matrices)
    values = sum(max(1, tensor.shape[0]) for tensor in matrices) + KEPT_HIDDEN_VALUES * hidden
    kept = workload.tokens * values * element
    if workload.gradient_checkpointing and block.role in ("layer", "tower"):
        return workload.tokens * hidden * element, kept
    return kept, 0
