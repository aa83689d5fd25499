"""The largest batch of a training, made as the Trainer will make it, without the training noticing."""

import contextlib
import copy
import random
import sys
import types
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

from .. import log
from ..rng import undisturbed
from ..upstream.trainer import TrainerLike

EXAMPLES_READ = 256  # of plain lists; enough to see the longest examples of most data sets, and read in milliseconds
COLUMN_READ = 20_000  # of data sets that hold columns


def longest_batch(trainer: TrainerLike, batch_size: int, dataset: Any = None) -> Mapping[str, Any] | None:
    """Return the batch that `trainer.data_collator` makes of the `batch_size` longest samples; None if there is none.

    Only lists, of whatever, and plain `datasets.Dataset`s are read. Any other data set may augment at random, download
    or count when it is asked for a row, and training must not notice that somebody looked.

    Args:
        dataset: the one to read; by default that of the training.
    """
    dataset = trainer.train_dataset if dataset is None else dataset
    examples = longest_examples(dataset, batch_size)
    if not examples:
        return None
    try:
        with undisturbed(), _generators_of(trainer.data_collator):
            collator = _stand_in(trainer.data_collator)
            batch = collator([_without_unused_columns(trainer, row) for row in examples])
            if _rectangular(batch) and _length(examples[-1]) == _length(examples[0]) and len(examples) > 1:
                batch = _padded(trainer, dataset, collator, examples, batch)
    except Exception as error:  # the training itself will say what is wrong with it, in its own words
        log.debug(f"the collator fails on the longest sequences ({type(error).__name__}: {error})")
        return None
    return dict(batch) if isinstance(batch, Mapping) and batch else None


def _padded(
    trainer: TrainerLike, dataset: Any, collator: Any, examples: list[Any], batch: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the batch with a short row in it, which brings the mask of a batch with padding; or `batch` as it is."""
    short = longest_examples(dataset, EXAMPLES_READ)[-1]
    if _length(short) == _length(examples[0]):
        return batch
    mixed = collator([_without_unused_columns(trainer, row) for row in (*examples[:-1], short)])
    return mixed if _rectangular(mixed) and mixed["input_ids"].shape == batch["input_ids"].shape else batch


def _stand_in(collator: Any) -> Any:
    """Return a collator that draws from generators of its own, and makes them where the first batch does.

    A collator with a seed (transformers' for masked language models, for one) would mask other tokens in training.
    """
    if isinstance(collator, partial):
        return partial(_stand_in(collator.func), *collator.args, **collator.keywords)
    if isinstance(collator, types.MethodType):
        return types.MethodType(collator.__func__, _stand_in(collator.__self__))
    if isinstance(collator, (type, types.FunctionType)):
        return collator
    twin = copy.copy(collator)
    for name, value in vars(twin).items():
        if _is_generator(value):
            setattr(twin, name, copy.deepcopy(value))
    return twin


@contextlib.contextmanager
def _generators_of(collator: Any) -> Iterator[None]:
    """Give the generators that a collator's function reads, from around it or from its module, their states back."""
    while isinstance(collator, partial):
        collator = collator.func
    function: Any = getattr(collator, "__func__", collator)
    code = getattr(function, "__code__", None)
    values = []
    if code is not None:
        values = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        values += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    states = [(value, _state_of(value)) for value in values if _is_generator(value)]
    try:
        yield
    finally:
        for generator, state in states:
            _restore(generator, state)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - asking is the only way to know
    except ValueError:
        return False
    return True


def _state_of(generator: Any) -> Any:
    if hasattr(generator, "bit_generator"):  # numpy's newer ones
        return copy.deepcopy(generator.bit_generator.state)
    return next(getattr(generator, name)() for name in ("getstate", "get_state") if hasattr(generator, name))


def _restore(generator: Any, state: Any) -> None:
    if hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        next(getattr(generator, name) for name in ("setstate", "set_state") if hasattr(generator, name))(state)


def _is_generator(value: Any) -> bool:
    import torch

    numpy = sys.modules.get("numpy")
    kinds = (random.Random, torch.Generator, *((numpy.random.Generator, numpy.random.RandomState) if numpy else ()))
    return isinstance(value, kinds)


def _rectangular(batch: Any) -> bool:
    return isinstance(batch, Mapping) and len(getattr(batch.get("input_ids"), "shape", ())) == 2


def longest_examples(dataset: Any, count: int) -> list[Any]:
    """Return the `count` samples with the most tokens among the first of a data set, the longest first.

    Rows that are not tokenized yet are taken as they come. There are fewer where the data set has fewer.
    """
    library = sys.modules.get("datasets")
    if library is not None and isinstance(dataset, library.Dataset):
        if dataset.format["type"] == "custom":
            return []
        positions: list[int] = list(range(min(len(dataset), COLUMN_READ)))
        if "input_ids" in dataset.column_names:
            # One column only: decoding pictures would take long.
            column = dataset.select_columns(["input_ids"]).with_format(None)[: len(positions)]["input_ids"]
            positions.sort(key=lambda position: -len(column[position]))
        return [dataset[position] for position in positions[:count]]
    if isinstance(dataset, list):
        return sorted(islice(dataset, EXAMPLES_READ), key=lambda row: -_length(row))[:count]
    return []


def shortest_length(dataset: Any) -> int:
    """Return the tokens of the shortest row among the first of a data set; 0 where that cannot be seen."""
    library = sys.modules.get("datasets")
    if library is not None and isinstance(dataset, library.Dataset):
        if dataset.format["type"] == "custom" or "input_ids" not in dataset.column_names:
            return 0
        column = dataset.select_columns(["input_ids"]).with_format(None)[: min(len(dataset), COLUMN_READ)]["input_ids"]
        return min(map(len, column), default=0)
    examples = islice(dataset, EXAMPLES_READ) if isinstance(dataset, list) else ()
    return min(map(_length, examples), default=0)


def _length(row: Any) -> int:
    """Return the number of tokens in an item, as far as that can be seen: of pairs and texts it is their length."""
    if isinstance(row, Mapping):
        row = row.get("input_ids")
    if isinstance(row, tuple):  # of tensors, as data sets of torch have them
        return max((_length(member) for member in row), default=0)
    return len(row) if hasattr(row, "__len__") and getattr(row, "ndim", 1) > 0 else 0


def _without_unused_columns(trainer: TrainerLike, row: Any) -> Any:
    """Return the row as the Trainer's own loader hands it to the collator."""
    if not isinstance(row, Mapping):
        return row
    if not trainer.args.remove_unused_columns:
        return dict(row)
    trainer._set_signature_columns_if_needed()
    columns = trainer._signature_columns or ()
    return {name: value for name, value in row.items() if name in columns}
