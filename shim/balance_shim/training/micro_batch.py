"""Run a step in smaller or larger micro-batches, with the same effective batch, steps and losses.

The effective batch of one process is micro-batch times accumulation. Divisors of it can be the micro-batch.
"""

import dis
import gc
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from .. import devices, log, state
from ..monitoring.out_of_memory import is_out_of_memory
from ..replicas import together
from ..training_run import Part
from ..upstream.trainer import TrainerLike, TrainingArgumentsLike
from ..versions import version_of

if TYPE_CHECKING:
    from torch import nn

LOSS_OF_A_STEP_SINCE = (4, 46)  # transformers divides by the label tokens of the whole step, not by micro-batches
DIVIDES_UNCOUNTED_SINCE = (4, 53)  # what has no labels to count is divided by the accumulation

LIBRARIES = ("transformers", "trl", "swift")  # whose compute_loss is known
# Where arguments keep the script's (rows at a time, accumulation): an attribute, as they cannot be hashed, and their
# copies need it too.
_ASKED = "_balance_shim_batch"

Inputs = Mapping[str, Any]
Run = Callable[[Any, Inputs], Any]


def adjust_arguments(arguments: TrainingArgumentsLike) -> None:
    """Put the number of `BALANCE_MICRO_BATCH` into `TrainingArguments` that are being made, if it is a number."""
    wanted = state.settings().micro_batch
    if not isinstance(wanted, int):
        return
    effective = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    size = max(each for each in divisors(effective) if each <= wanted)
    if size != wanted:
        log.once(
            "warning",
            f"BALANCE_MICRO_BATCH={wanted} does not divide the effective batch of {effective} sequences; using {size}",
        )
    before = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = size, effective // size
    vars(arguments)[_ASKED] = before


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, the largest first."""
    return [each for each in range(number, 0, -1) if number % each == 0]


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
    low, high = 0, len(sizes) - 1  # more rows take more memory: the sizes that fit are the last ones
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
    """Have `trainer`, which has not begun to train, take `size` rows at a time, `accumulation` times a step."""
    trainer.args.per_device_train_batch_size = size
    trainer.args.gradient_accumulation_steps = accumulation
    trainer._train_batch_size = trainer.args.train_batch_size
    if version_of("transformers") < LOSS_OF_A_STEP_SINCE:
        trainer.accelerator.gradient_accumulation_steps = accumulation


def begin(trainer: TrainerLike) -> None:
    """Begin a training of `trainer`: forget the step that one before it was in when it ended, and keep its losses.

    The number of `BALANCE_MICRO_BATCH` came before the trainer, which may be one whose losses or rows depend on it.
    """
    _PORTIONS.drop(trainer)
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
    """Return why micro-batches of `size` rows instead of `before` would change what `trainer` learns; "" if not."""
    if size == before:
        return ""
    if ignores_count(trainer):
        return (
            f"compute_loss of {type(trainer).__name__} ignores num_items_in_batch, and transformers adds up "
            "its losses over the accumulation, so another micro-batch gives other losses"
        )
    if trainer.args.dataloader_drop_last:
        try:
            rows = len(trainer.train_dataset)
        except TypeError:
            return "dataloader_drop_last drops sequences per micro-batch, of a dataset of unknown length"
        if rows // before * before != rows // size * size:
            return f"dataloader_drop_last would drop other sequences of {rows} with micro-batches of {size}"
    return ""


def ignores_count(trainer: TrainerLike) -> bool:
    """Whether the script's own `compute_loss` makes a loss of a micro-batch alone, which is taken for one of the step.

    The Trainer adds such losses up without dividing them. To be seen in the code only: it never reads the argument.
    """
    function = inspect.unwrap(type(trainer).compute_loss)
    code = getattr(function, "__code__", None)
    library = getattr(function, "__module__", "").partition(".")[0] in LIBRARIES
    if code is None or library or not _taken_for_scaled(trainer, counted=True) or trainer.compute_loss_func is not None:
        return False
    named = {
        name
        for name, each in inspect.signature(function).parameters.items()
        if name == "num_items_in_batch" or each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }
    read: set[Any] = set()
    for each in dis.get_instructions(code):
        if each.opname.startswith("LOAD_"):
            read.update(each.argval if isinstance(each.argval, tuple) else (each.argval,))
    return not named & read


def portions_of(trainer: TrainerLike) -> "Portions | None":
    """Return what runs the micro-batches of `trainer`; None where `BALANCE_MICRO_BATCH` is not set, or cannot act.

    Replicas that ran out of memory in a backward pass may have sent some of their gradients already.
    """
    if state.settings().micro_batch is None:
        return None
    if trainer.args.world_size > 1:
        log.once("info", "BALANCE_MICRO_BATCH: with several processes a step that runs out of memory is not repeated")
        return None
    return _PORTIONS.of(trainer) or _PORTIONS.keep(trainer, Portions())


class Portions:
    """Runs the micro-batches of a trainer in as many portions as it takes not to run out of memory.

    A micro-batch that runs out of memory may have left gradients of some parameters. So all gradients of the step are
    thrown away, and what it had of micro-batches is run again, in portions of half the size, from then on.
    """

    def __init__(self) -> None:
        self.count = 1
        self._done: list[Inputs] = []  # of this optimizer step
        self._counted = False

    def run(
        self, trainer: TrainerLike, run: Run, model: "nn.Module", inputs: Inputs, counted: bool, least: int = 1
    ) -> Any:
        """Return the loss of one micro-batch, its gradients added.

        Args:
            run: runs forward and backward pass of some rows, and returns their loss.
            counted: whether the Trainer has counted the label tokens of the step.
            least: the number of portions that this one is predicted to take.

        Raises:
            Exception: what `run` raises; of an out-of-memory the first one, if the rows cannot be divided.
        """
        self._counted = counted
        self.count = max(self.count, least)
        try:
            loss = self._as_it_fits(trainer, run, model, inputs)
        except BaseException:
            self._done = []  # the Trainer may begin anew, with smaller batches
            raise
        ended = bool(trainer.accelerator.sync_gradients)
        self._done = [] if ended else [*self._done, inputs]
        return loss

    def _as_it_fits(self, trainer: TrainerLike, run: Run, model: "nn.Module", inputs: Inputs) -> Any:
        again: list[Inputs] = []
        while True:
            try:
                for before in again:
                    self._in_portions(trainer, run, model, before)
                return self._in_portions(trainer, run, model, inputs)
            except Exception as failure:
                if not is_out_of_memory(failure) or not self._can_halve(trainer, inputs):
                    raise
            # Out of the handler, so that nothing holds the tensors of the pass that failed.
            self.count *= 2
            again = list(self._done)
            model.zero_grad(set_to_none=True)
            _free()
            log.warning(
                f"out of memory: micro-batches of {rows_of(inputs)} sequences run in {self.count} portions from now "
                "on; the step is repeated, nothing is lost"
            )

    def _can_halve(self, trainer: TrainerLike, inputs: Inputs) -> bool:
        rows = rows_of(inputs)
        return (
            rows is not None
            and rows >= 2 * self.count
            and _is_divisible(trainer, inputs, 2 * self.count, self._counted)
        )

    def _in_portions(self, trainer: TrainerLike, run: Run, model: "nn.Module", inputs: Inputs) -> Any:
        return run_in_portions(trainer, run, model, inputs, self.count, self._counted)


_PORTIONS: Part[Portions] = Part("portions of micro-batches")


def run_in_portions(
    trainer: TrainerLike, run: Run, model: "nn.Module", inputs: Inputs, count: int, counted: bool
) -> Any:
    """Return the loss of a micro-batch run in `count` portions, its gradients added; whole where it has fewer rows."""
    rows = rows_of(inputs)
    if count == 1 or rows is None or rows < count:
        return run(model, inputs)
    *earlier, last = portions(inputs, rows, count)
    with _shares(trainer, count, counted):
        wrapped: Any = model  # `no_sync` is of `DistributedDataParallel`
        with wrapped.no_sync() if together.is_wrapped(model) else nullcontext():
            losses = [run(model, each) for each in earlier]
        losses.append(run(model, last))  # replicas add up the gradients of all portions
    return sum(losses[1:], losses[0])


def splits_exactly(trainer: TrainerLike, inputs: Inputs, count: int, counted: bool) -> bool:
    """Whether `count` portions of the rows give what the whole gives, also where nobody has asked for portions.

    Then the loss has to be the sum over label tokens that the libraries divide by those of the step. A loss between
    rows (contrastive, or that of a mixture's router) or statistics of a batch would come out otherwise.
    """
    rows = rows_of(inputs)
    if rows is None or rows < count or not counted or not _is_divisible(trainer, inputs, count, counted):
        return False
    if state.settings().micro_batch is not None:
        return True
    function = inspect.unwrap(type(trainer).compute_loss)
    if getattr(function, "__module__", "").partition(".")[0] not in LIBRARIES or trainer.compute_loss_func is not None:
        return False
    return inputs.get("labels") is not None and not _couples_rows(trainer.model)


def _couples_rows(model: "nn.Module") -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "output_router_logits", False)) or any(
        isinstance(module, _BatchNorm) for module in model.modules()
    )


def rows_of(inputs: Inputs) -> int | None:
    """Return the number of rows of a batch of which everything is by rows; None for any other."""
    if not isinstance(inputs, Mapping) or any(isinstance(each, Mapping) for each in inputs.values()):
        return None
    sizes = {len(each) for each in inputs.values() if _is_by_rows(each)}
    return sizes.pop() if len(sizes) == 1 else None


def portions(inputs: Inputs, rows: int, count: int) -> list[dict[str, Any]]:
    """Return `count` batches that together hold the rows of `inputs`, as even as can be."""
    edges = [rows * place // count for place in range(count + 1)]
    return [
        {name: each[first:last] if _is_by_rows(each) else each for name, each in inputs.items()}
        for first, last in itertools.pairwise(edges)
    ]


def _is_by_rows(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def _taken_for_scaled(trainer: TrainerLike, counted: bool) -> bool:
    """Whether the Trainer takes a loss for one that is divided by the label tokens of the whole step already.

    Losses of portions then add up, if they are.
    """
    version = version_of("transformers")
    if version < LOSS_OF_A_STEP_SINCE:
        return False
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    by_model = trainer.model_accepts_loss_kwargs and (counted or version < DIVIDES_UNCOUNTED_SINCE)
    return bool(by_model or trainer.compute_loss_func is not None)


def _is_divisible(trainer: TrainerLike, inputs: Inputs, count: int, counted: bool) -> bool:
    """Whether portions give the loss of the whole: losses add up, or all portions have as many labels."""
    if _taken_for_scaled(trainer, counted):
        return counted and not ignores_count(trainer)
    rows, labels = rows_of(inputs), inputs.get("labels")
    if rows is None or rows % count or not hasattr(labels, "ne"):
        return False
    counts = {int(each["labels"].ne(-100).sum()) for each in portions(inputs, rows, count)}
    return len(counts) == 1


@contextmanager
def _shares(trainer: TrainerLike, count: int, counted: bool) -> Iterator[None]:
    """Have each loss count for its share, where it is a mean of its own rows."""
    if _taken_for_scaled(trainer, counted):
        yield
        return
    owners: list[tuple[Any, str]] = [(trainer.args, "gradient_accumulation_steps")]
    if version_of("transformers") < LOSS_OF_A_STEP_SINCE:
        owners.append((trainer.accelerator, "gradient_accumulation_steps"))
    elif hasattr(trainer, "current_gradient_accumulation_steps"):
        owners.append((trainer, "current_gradient_accumulation_steps"))
    before = [getattr(owner, name) for owner, name in owners]
    try:
        for (owner, name), value in zip(owners, before, strict=True):
            setattr(owner, name, value * count)
        yield
    finally:
        for (owner, name), value in zip(owners, before, strict=True):
            setattr(owner, name, value)


def _free() -> None:
    import torch

    gc.collect()
    kind = devices.accelerator_type()
    if kind is not None:
        torch.get_device_module(kind).empty_cache()
