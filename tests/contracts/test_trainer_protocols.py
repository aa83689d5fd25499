"""The protocols of `upstream.trainer`, held against the installed transformers."""

from typing import Protocol

import pytest

from balance_shim.upstream import trainer as protocols


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = str(tmp_path_factory.mktemp("out"))
    arguments = transformers.TrainingArguments(folder, use_cpu=True, report_to=[])
    return transformers.Trainer(torch.nn.Linear(2, 2), arguments)


def members(protocol):
    """Return the names of the attributes and methods of a protocol."""
    machinery = vars(Protocol).keys() | {"_is_protocol", "_is_runtime_protocol", "_abc_impl"}
    methods = {name for name in vars(protocol) if not name.startswith("__")} - machinery
    return sorted(methods | set(protocol.__annotations__))


@pytest.mark.parametrize(
    ("protocol", "path"),
    [("TrainerLike", ""), ("TrainingArgumentsLike", "args"), ("TrainerStateLike", "state"),
     ("CallbackHandlerLike", "callback_handler")],
)  # fmt: skip
def test_every_attribute_exists(trainer, protocol, path):
    """A Trainer that has not trained yet has each attribute of the protocol."""
    names = members(getattr(protocols, protocol))
    instance = getattr(trainer, path) if path else trainer
    assert names and not [name for name in names if not hasattr(instance, name)]
