"""Mixture-of-experts blocks as ZeRO leaf modules, so that every rank gathers all experts whichever its tokens choose.

Otherwise ranks would gather different experts, each waiting for the others. Source: DeepSpeed's set_z3_leaf_modules.
"""

from typing import Any

from .. import log


def mark_leaf_modules(model: Any) -> None:
    """Tell DeepSpeed of each block in `model` that holds a list of experts, a module each.

    Experts that are one module with large tensors, as in transformers 5, need none of it.
    """
    kinds = leaf_classes(model)
    if kinds:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, kinds)
        log.once(
            "info", f"{', '.join(kind.__name__ for kind in kinds)}: experts are gathered together (ZeRO leaf module)"
        )


def leaf_classes(model: Any) -> list[type]:
    """Return the classes of the blocks in `model` whose experts are modules of a list."""
    from torch import nn

    kinds: dict[type, None] = {}
    for module in model.modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.ModuleList) and len(experts) > 1:
            kinds[type(module)] = None
    return list(kinds)
