"""`model.save_pretrained`, and merging adapters, by the script itself: under ZeRO-3 with empty tensors, without a word.

The Trainer gathers the weights before it saves and hands them over; a script that was written for one process does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ...patching.guard import attempt, insist
from .. import meeting, shared_paths
from . import prompts
from .partitioned_parameter import is_partitioned

if TYPE_CHECKING:
    from torch import nn


def save(
    original: Callable[..., Any], model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any], trained: bool
) -> Any:
    """Call `original`, which saves `model`, with whole weights; they are written by the first rank.

    Args:
        trained: whether only trained parameters are saved, as PEFT does.

    Raises:
        BalanceError: not all ranks save, so that the weights cannot be gathered.
    """
    weights = kwargs.get("state_dict")
    if weights is not None:
        with prompts.computed_from(weights, model) if trained and is_divided(model) else nullcontext():
            return original(model, *args, **kwargs)
    if not is_divided(model):
        return _save_plain(original, model, args, kwargs)
    weights = insist("gathering the weights to save", gathered, model, trained)
    # The other ranks must not write, whatever they are told: transformers would put an empty file over the first one's.
    result = None
    if weights is not None:
        with prompts.computed_from(weights, model) if trained else nullcontext():
            result = original(model, *args, **{**kwargs, "state_dict": weights})
    wait_for_all()  # what the script does next may need the files
    return result


def _save_plain(original: Callable[..., Any], model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `original` on each rank that has a folder of its own; of one that they share, the first rank alone writes.

    transformers 5 leaves out all ranks but the first once there is a process group; 4.x has all of them write.
    """
    path = args[0] if args else kwargs.get("save_directory")
    if path is None or kwargs.get("is_main_process") is False:
        return original(model, *args, **kwargs)
    writes = attempt("finding out which rank writes", shared_paths.writes_itself, path, default=False)
    if not writes:
        result = original(model, *args, **{**kwargs, "is_main_process": False})
        attempt("waiting for the first rank to write", shared_paths.wait_until_written, path)
        return result
    vars(model)["should_save_on_this_rank"] = bool  # of `is_main_process`
    try:
        result = original(model, *args, **kwargs)
    finally:
        vars(model).pop("should_save_on_this_rank", None)
    attempt("telling the other ranks what is written", shared_paths.has_written, path)
    return result


def wait_for_all() -> None:
    """Go on once every rank has come here."""
    import torch.distributed as dist

    dist.barrier()


def is_divided(model: "nn.Module") -> bool:
    """Whether parameters of `model` are partitioned now."""
    return any(is_partitioned(parameter) for parameter in model.parameters())


def gathered(model: "nn.Module", trained: bool = False) -> dict[str, Any] | None:
    """Return the whole state of `model` in host memory on the first rank, None on other ranks. Ranks work together.

    Args:
        trained: whether to leave out frozen parameters.

    Raises:
        BalanceError: not all ranks are here.
    """
    import torch.distributed as dist
    from deepspeed import zero

    meeting.meet("save_pretrained", "Let every rank call it (only the first writes), or use trainer.save_model()")
    first = dist.get_rank() == 0
    state: dict[str, Any] = {}
    copies: dict[int, Any] = {}  # tied ones are one in the file, too
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not hasattr(tensor, "detach") or (trained and not tensor.requires_grad and hasattr(tensor, "ds_id")):
            continue
        with zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if first and id(tensor) not in copies:  # a copy: the parts are put away again
                copies[id(tensor)] = tensor.detach().cpu().clone()
        if first:
            state[name] = copies[id(tensor)]
    return state if first else None


@contextmanager
def merging_whole(model: "nn.Module") -> Iterator[None]:
    """Have each adapted layer of `model` whole while it merges its adapter. Ranks work together."""
    from deepspeed import zero

    meeting.meet("merging adapters")
    adapted = (module for module in model.modules() if hasattr(module, "base_layer"))
    layers = [layer for layer in adapted if callable(getattr(layer, "merge", None))]

    def whole(layer: Any) -> Callable[..., Any]:
        merge = layer.merge

        def merged(*args: Any, **kwargs: Any) -> Any:
            with zero.GatheredParameters(list(layer.parameters()), modifier_rank=0):  # whose result the others take
                return merge(*args, **kwargs)

        return merged

    for layer in layers:
        vars(layer)["merge"] = whole(layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("merge", None)
