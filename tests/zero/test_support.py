"""The table of combinations: every refusal is provoked, every proof is a test that exists, and the page is current."""

import ast
import json
import re
import string
import sys
from pathlib import Path

import pytest

from balance_shim.errors import BalanceError
from balance_shim.zero_support import AREAS, TABLE, configuration, launching, refusal, sentence, training
from balance_shim.zero_support import models as models_and_weights
from tests import models
from tests.end_to_end.run import on_python_path, run_command

TESTS = Path(__file__).resolve().parents[1]
SCRIPTS = Path(__file__).with_name("scripts")
PROVOKED = "zero/test_support.py::test_refused"
TRAINED = "zero/test_combinations.py::test_trained"


def parameters_of(prefix):
    return [key for key, combination in TABLE.items() if combination.proof.startswith(prefix + "[")]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What a script that asks for each refused combination in turn is told, by key; it is one rank, alone."""
    folder = tmp_path_factory.mktemp("refused")
    models.saved_llama(folder / "model", num_hidden_layers=1)
    arguments = ["--model", str(folder / "model"), "--output", str(folder / "refused.json")]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {**on_python_path(), "BALANCE_MODE": "zero3", **rank}
    run_command([sys.executable, str(SCRIPTS / "refused.py"), *arguments], environment).expect_success()
    return json.loads((folder / "refused.json").read_text())


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("key", parameters_of(PROVOKED))
def test_refused(key, refused):
    """A script that asks for it gets the table's sentence as a ZeroError, with every field filled."""
    kind, line = refused[key]
    assert kind == "ZeroError", line
    assert re.fullmatch(re.escape("BALANCE_MODE=zero3: ") + pattern(TABLE[key].message), line), line


def pattern(message):
    """The message as a regular expression: anything in the place of a field."""
    parts = string.Formatter().parse(message)
    return "".join(re.escape(text) + (".+" if field else "") for text, field, _, _ in parts)


def test_device_map_is_dropped(refused):
    """The model loads all the same, partitioned, and the line is logged."""
    assert refused["device_map"] == ["loaded", sentence("device_map", device_map="'auto'")]


def test_every_combination_is_proved():
    """The proof of each is a test that exists, with the parameter that it names."""
    for key, combination in TABLE.items():
        path, _, name = combination.proof.partition("::")
        function, bracket, parameter = name.partition("[")
        source = (TESTS / path).read_text(encoding="utf-8")
        functions = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        assert function in functions, (key, combination.proof)
        if combination.proof.startswith((PROVOKED, TRAINED)):
            script = (
                SCRIPTS / ("refused.py" if combination.proof.startswith(PROVOKED) else "combinations.py")
            ).read_text()
            assert f'"{parameter[:-1]}"' in script, (key, combination.proof)
        elif bracket:
            assert parameter[:-1] in source, (key, combination.proof)


def test_combinations_are_complete():
    """Refusals have a sentence or say why, notes have a line, and the areas are those of the page, in its order."""
    combinations = (*launching.ROWS, *configuration.ROWS, *models_and_weights.ROWS, *training.ROWS)
    assert len({combination.key for combination in combinations}) == len(combinations) == len(TABLE)
    for key, combination in TABLE.items():
        assert combination.key == key and combination.area in AREAS
        assert combination.outcome == "works" or combination.message or combination.reason, key
        assert combination.outcome != "works" or not combination.message, key
    assert {combination.area for combination in TABLE.values()} == set(AREAS)


def test_a_refusal_is_one_line_with_the_mode():
    """It can be caught as what the shim raises, and a field that is missing is a failure of the caller's."""
    error = refusal("quantized", cls="Model")
    assert isinstance(error, BalanceError) and str(error).startswith("BALANCE_MODE=zero3: ZeRO-3 cannot partition")
    assert "\n" not in str(error)
    with pytest.raises(KeyError):
        refusal("quantized")


def test_sentences_are_written_once():
    """No module of the shim but the table spells out a refusal of the table."""
    package = TESTS.parent / "shim" / "balance_shim"
    starts = [re.split(r"\{", combination.message)[0] for combination in TABLE.values() if combination.message]
    starts = [start for start in starts if len(start) > 20]
    assert starts
    for path in package.rglob("*.py"):
        if "zero_support" not in path.parts:
            source = path.read_text(encoding="utf-8")
            assert not [start for start in starts if start in source], path
