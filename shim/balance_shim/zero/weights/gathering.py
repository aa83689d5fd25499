"""Weights that a script uses outside of their module, whole for as long as the step needs them.

DeepSpeed gathers a module's weights around its forward and backward. What a script computes with a weight itself, such
as a loss in chunks from `lm_head.weight`, needs the weight until the end of the backward pass, where its gradient
adds to that of the module.
"""

from typing import Any

_for_gradient: set[int] = set()  # DeepSpeed's numbers of parameters that are gathered when their gradient arrives
_held: dict[int, tuple[Any, bool]] = {}  # by DeepSpeed's number: the parameter, and whether DeepSpeed holds it itself


def hold(parameters: list[Any]) -> None:
    """Gather `parameters`, and keep them so until `release`. All ranks do this together."""
    await_prefetch(parameters)
    parameters[0].all_gather(param_list=parameters)
    for parameter in parameters:
        if parameter.ds_id not in _held:
            _held[parameter.ds_id] = (parameter, parameter.is_external_param)
            # DeepSpeed's coordinator keeps those that it knows to be used outside of their module.
            parameter.is_external_param = True


def await_prefetch(parameters: list[Any]) -> None:
    """Wait for those of `parameters` that an engine has begun to gather for a module that is to come."""
    for parameter in parameters:
        if parameter.ds_status.name == "INFLIGHT":
            registry = parameter._z3_optimizer.parameter_offload.module.ds_inflight_param_registry
            registry.pop(parameter).wait()


def release() -> None:
    """Partition the held weights: the backward pass is over, or the weights are about to change."""
    while _held:
        _, (parameter, was_external) = _held.popitem()
        parameter.is_external_param = was_external
        if was_external or parameter.ds_persist or parameter.ds_status.name != "AVAILABLE":
            continue
        if not parameter.ds_active_sub_modules:
            parameter.partition()


def gather_for_gradient(parameter: Any) -> None:
    """Have `parameter` whole whenever its gradient arrives; it stays so until `release`.

    An operation that gathers the weight for its own backward (TRL's fused head, 1.16) has partitioned it again by the
    time autograd stores the gradient, which autograd copies into the layout of the weight: an empty tensor.
    """
    if parameter.ds_id in _for_gradient or not has_optimizer(parameter):
        return
    _for_gradient.add(parameter.ds_id)

    def before_gradient(gradient: Any) -> None:
        if gradient.numel() == parameter.ds_numel and parameter.ds_status.name != "AVAILABLE":
            hold([parameter])

    parameter.register_hook(before_gradient)


def has_optimizer(parameter: Any) -> bool:
    """Whether a DeepSpeed engine that trains collects gradients of `parameter`."""
    return getattr(parameter, "_z3_optimizer", None) is not None
