"""Modules that train ahead of a frozen model: soft prompts, virtual keys and values, a custom module.

Nothing of the model itself need train for gradients to pass through all of its layers then, and for all of them to keep
what that takes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...upstream.model_ends import input_embedding
from ...virtual.machine import Machine
from ..workload import Workload
from .errors import CannotTrace
from .machine import traced
from .model_copy import PassOn

IGNORED = -100  # the label of tokens that no loss is computed for


def fed(model: nn.Module, batch: Mapping[str, Any], workload: Workload, machine: Machine) -> dict[str, Any]:
    """Return the inputs of `model` for `batch` after the modules that run ahead of it, as PEFT 0.15 to 0.21 pass them.

    Args:
        model: a traced copy.
        batch: the output of the script's data collator, traced.

    Raises:
        CannotTrace: the model has no embedding or no layers to run something ahead of.
    """
    inputs = dict(batch)
    if workload.prefix_tokens:
        return _with_keys_and_values(model, inputs, workload.prefix_tokens, machine)
    ids = inputs.get("input_ids")
    if ids is None or not (workload.prompt_tokens or workload.trains_ahead):
        return inputs
    embedding = input_embedding(model)
    if embedding is None:
        raise CannotTrace(f"{type(model).__name__} has no embedding to place prompts with")
    if not workload.prompt_tokens:
        embedding.register_forward_hook(_requires_gradients)
        return inputs
    embedded = embedding(inputs.pop("input_ids"))
    shape = (embedded.shape[0], workload.prompt_tokens, embedded.shape[2])
    prompts = _trained(shape, embedded.dtype, machine)
    inputs["inputs_embeds"] = torch.cat((prompts, embedded), dim=1)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    for name, value in (("attention_mask", 1), ("labels", IGNORED), ("position_ids", None), ("token_type_ids", None)):
        if value is None:
            inputs.pop(name, None)  # PEFT drops them, with a warning
        elif inputs.get(name) is not None and not (encodes and name == "labels"):
            inputs[name] = _lengthened(inputs[name], workload.prompt_tokens, value)
    return inputs


def _requires_gradients(_: nn.Module, __: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def _trained(shape: tuple[int, ...], dtype: torch.dtype, machine: Machine) -> torch.Tensor:
    """Return the output of a module of the script's own, on the device where inputs arrive."""
    return traced(torch.empty(shape, dtype=dtype, device="meta"), 0, machine).requires_grad_()


def _lengthened(values: torch.Tensor, tokens: int, value: int) -> torch.Tensor:
    front = torch.full((values.shape[0], tokens), value, dtype=values.dtype, device=values.device)
    return torch.cat((front, values), dim=1) if values.dim() == 2 else values


def _with_keys_and_values(model: nn.Module, inputs: dict[str, Any], tokens: int, machine: Machine) -> dict[str, Any]:
    from transformers import DynamicCache

    config: Any = getattr(model, "config", None)
    ids = inputs.get("input_ids")
    if config is None or ids is None or getattr(config, "is_encoder_decoder", False):
        raise CannotTrace(f"{type(model).__name__} is not known to accept cached keys and values")
    config = config.get_text_config()
    layers = _layers(model, config.num_hidden_layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    batch_size, cache = ids.shape[0], DynamicCache()
    flat = _trained((batch_size, tokens, 2 * len(layers), heads, width), dtype, machine)
    keys_and_values = flat.permute(2, 0, 3, 1, 4).split(2)
    for number, (layer, (keys, values)) in enumerate(zip(layers, keys_and_values, strict=True)):
        place = keys.device if isinstance(layer, PassOn) else next(layer.parameters()).device
        cache.update(keys.to(place), values.to(place), number)
    if inputs.get("attention_mask") is not None:
        inputs["attention_mask"] = _lengthened(inputs["attention_mask"], tokens, 1)
    return {**inputs, "past_key_values": cache}


def _layers(model: nn.Module, count: int) -> list[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise CannotTrace(f"{type(model).__name__} has no list of {count} layers")
