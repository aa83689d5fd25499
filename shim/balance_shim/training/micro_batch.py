"""`BALANCE_MICRO_BATCH`: set the size of micro-batches, with the same effective batch, steps and losses.

The effective batch of one process is micro-batch times accumulation. Divisors of it can be the micro-batch.
"""

from collections.abc import Callable

from .. import log, state
from ..replicas import together
from ..upstream.trainer import TrainerLike, TrainingArgumentsLike
from ..versions import version_of
from . import portions
from .loss_scale import LOSS_OF_A_STEP_SINCE, ignores_count

# Where arguments keep the script's (sequences at a time, accumulation): an attribute, as they cannot be hashed, and
# their copies need it too.
_ASKED = "_balance_shim_batch"


def adjust_arguments(arguments: TrainingArgumentsLike) -> None:
    """Put the number of `BALANCE_MICRO_BATCH` into `TrainingArguments` that are being made, if it is a number."""
    requested = state.settings().micro_batch
    if not isinstance(requested, int):
        return
    effective = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    size = max(divisor for divisor in divisors(effective) if divisor <= requested)
    if size != requested:
        log.once(
            "warning",
            f"BALANCE_MICRO_BATCH={requested} does not divide the effective batch of {effective} sequences; "
            f"using {size}",
        )
    before = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = size, effective // size
    vars(arguments)[_ASKED] = before


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, the largest first."""
    return [candidate for candidate in range(number, 0, -1) if number % candidate == 0]


def take_largest(trainer: TrainerLike, fits: Callable[[], bool]) -> None:
    """Set the largest micro-batch of `trainer` with which it `fits()`; the smallest if it does with none.

    Args:
        fits: whether the plan for the trainer as it is now fits the devices.
    """
    arguments = trainer.args
    if arguments.auto_find_batch_size:
        log.once("warning", "BALANCE_MICRO_BATCH=auto: the script sets auto_find_batch_size, which takes precedence")
        return
    before = arguments.per_device_train_batch_size
    effective = before * arguments.gradient_accumulation_steps
    reasons = {size: _reason_against(trainer, before, size) for size in divisors(effective)}
    sizes = [size for size, reason in reasons.items() if not reason]
    if len(sizes) == 1:
        for reason in filter(None, reasons.values()):
            log.once("warning", f"BALANCE_MICRO_BATCH=auto: {reason}, so it stays {before}")
            break
        return
    low, high = 0, len(sizes) - 1  # more sequences take more memory: the sizes that fit are the last ones
    while low < high:
        middle = (low + high) // 2
        set_size(trainer, sizes[middle], effective // sizes[middle])
        low, high = (low, middle) if fits() else (middle + 1, high)
    size = together.least(sizes[low], arguments.device)  # ranks whose shares differ take the same
    set_size(trainer, size, effective // size)
    if size != before:
        accumulation = effective // size
        log.info(f"micro-batch {size} instead of {before}, accumulation {accumulation}: {effective} sequences per step")


def set_size(trainer: TrainerLike, size: int, accumulation: int) -> None:
    """Have `trainer`, which has not begun to train, take `size` sequences at a time, `accumulation` times a step."""
    trainer.args.per_device_train_batch_size = size
    trainer.args.gradient_accumulation_steps = accumulation
    trainer._train_batch_size = trainer.args.train_batch_size
    if version_of("transformers") < LOSS_OF_A_STEP_SINCE:
        trainer.accelerator.gradient_accumulation_steps = accumulation


def begin(trainer: TrainerLike) -> None:
    """Begin a training of `trainer`: forget the step that one before it was in when it ended, and keep its losses.

    The number of `BALANCE_MICRO_BATCH` came before the trainer, which may be one whose losses or sequences depend
    on it.
    """
    portions.forget(trainer)
    arguments = trainer.args
    size, accumulation = vars(arguments).get(_ASKED, (arguments.per_device_train_batch_size, 0))
    reason = _reason_against(trainer, size, arguments.per_device_train_batch_size)
    if not reason:
        return
    goes_back = not getattr(trainer, "is_deepspeed_enabled", False)  # which has the number in its config by now
    if goes_back:
        set_size(trainer, size, accumulation)
    end = f", so it stays {size}" if goes_back else ""
    log.once("warning", f"BALANCE_MICRO_BATCH={state.settings().micro_batch}: {reason}{end}")


def _reason_against(trainer: TrainerLike, before: int, size: int) -> str:
    """Return why micro-batches of `size` instead of `before` sequences would change the result; "" if not."""
    if size == before:
        return ""
    if ignores_count(trainer):
        return (
            f"compute_loss of {type(trainer).__name__} ignores num_items_in_batch, and transformers adds up "
            "its losses over the accumulation, so another micro-batch gives other losses"
        )
    if trainer.args.dataloader_drop_last:
        try:
            sequences = len(trainer.train_dataset)
        except TypeError:
            return "dataloader_drop_last drops sequences per micro-batch, of a dataset of unknown length"
        if sequences // before * before != sequences // size * size:
            return f"dataloader_drop_last would drop others of {sequences} sequences with micro-batches of {size}"
    return ""
