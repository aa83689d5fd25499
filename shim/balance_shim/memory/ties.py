"""Parameters that are one tensor under several names, such as an embedding that is also the head."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def tied_groups(model: "nn.Module") -> tuple[frozenset[str], ...]:
    """Return the groups of parameter names that share, or will share, one tensor.

    transformers 5 ties after the device map is made and lists beforehand what it will tie (`all_tied_weights_keys`);
    4.x has tied by then, which shows in the parameters themselves.
    """
    groups: list[set[str]] = []
    by_identity: dict[int, set[str]] = {}
    present = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), set()).add(name)
        present.add(name)
    announced = getattr(model, "all_tied_weights_keys", None)
    pairs = [{target, source} for target, source in announced.items()] if isinstance(announced, dict) else []
    pairs = [pair for pair in pairs if pair <= present]  # adapters give a layer's weight another name, tied by then
    for names in [*(names for names in by_identity.values() if len(names) > 1), *pairs]:
        touching = [group for group in groups if group & names]
        groups = [group for group in groups if not group & names]
        groups.append(names.union(*touching))
    return tuple(frozenset(group) for group in groups)


def parameter_count(model: "nn.Module", ties: Iterable[frozenset[str]]) -> int:
    """Return the number of parameters, tied ones once, whether they are tied yet or not."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    repeated = {name for group in ties for name in sorted(group)[1:]}
    return sum(parameter.numel() for name, parameter in parameters.items() if name not in repeated)
