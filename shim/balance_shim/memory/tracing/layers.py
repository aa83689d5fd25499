"""Groups of identical layers, of which only one has to be traced."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..blocks import Block
from ..structure import ModelStructure

if TYPE_CHECKING:
    from torch import nn

# Attributes that number layers; everything else that differs makes two layers different.
_NUMBERING = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx", "index", "depth"})
_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Sample:
    """Which blocks are traced, and which other blocks each of them represents.

    Attributes:
        left_out: the names of the layers that do not run in the trace.
        speaks_for: block name -> name of the traced block that is like it; traced blocks speak for themselves.
    """

    left_out: frozenset[str]
    speaks_for: dict[str, str]

    @property
    def whole(self) -> bool:
        """Whether every block is traced."""
        return not self.left_out


def sample(model: "nn.Module", structure: ModelStructure) -> Sample:
    """Return the layers to trace: of each kind the first two in a list of layers, and the one behind each.

    The first layer is special where its input needs no gradient, so the second one speaks for the rest. What a layer
    keeps may be kept by the layer behind it, as its input, so that one has to run as well. The last layer of a tower
    is a kind of its own, because many models take the output of the one before. Layers that share weights all run: the
    module would be missing under its other names, and memory that layers share counts with the last of them.
    """
    blocks, shared = structure.blocks, structure.sharing_layers
    modules = dict(model.named_modules(remove_duplicate=False))
    lists: dict[str, list[Block]] = {}
    for block in blocks:
        numbered = block.name.rpartition(".")[2].isdigit() and block.name not in shared
        if numbered and block.role in ("layer", "tower"):
            lists.setdefault(block.name.rpartition(".")[0], []).append(block)
    left_out: set[str] = set()
    speaks_for = {block.name: block.name for block in blocks}
    for layers in lists.values():
        kinds: dict[Any, list[int]] = {}
        for position, block in enumerate(layers):
            unused = block.role == "tower" and position == len(layers) - 1
            kinds.setdefault((unused, *_kind(model, block.name, modules[block.name])), []).append(position)
        run: set[int] = set()
        for positions in kinds.values():
            run.update(positions[:2])
            run.update(position + 1 for position in positions[:2] if position + 1 < len(layers))
        left_out.update(block.name for position, block in enumerate(layers) if position not in run)
        for positions in kinds.values():
            speaker = layers[positions[min(1, len(positions) - 1)]].name
            for position in positions[1:]:
                speaks_for[layers[position].name] = speaker
    return Sample(frozenset(left_out), speaks_for)


def everything(blocks: Sequence[Block]) -> Sample:
    """Return the sample that leaves nothing out."""
    return Sample(frozenset(), {block.name: block.name for block in blocks})


def _kind(model: "nn.Module", name: str, layer: "nn.Module") -> tuple[Any, ...]:
    """Return a key that is equal for two layers that take the same memory."""
    parts = []
    for inner, module in layer.named_modules():
        plain = [
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, _PLAIN) and key not in _NUMBERING and not key.startswith("_")
        ]
        tensors = [
            (key, tensor.shape, tensor.dtype, tensor.requires_grad)
            for key, tensor in module._parameters.items()
            if tensor is not None
        ]
        tensors += [
            (key, tensor.shape, tensor.dtype, False) for key, tensor in module._buffers.items() if tensor is not None
        ]
        parts.append((inner, type(module).__qualname__, tuple(plain), tuple(tensors)))
    return (*parts, _declared_type(model, name))


def _declared_type(model: "nn.Module", name: str) -> str | None:
    """Return this layer's type in the config (sliding or full attention), where some models read it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    types = getattr(text, "layer_types", None)
    number = int(name.rpartition(".")[2])
    return types[number] if isinstance(types, (list, tuple)) and number < len(types) else None
