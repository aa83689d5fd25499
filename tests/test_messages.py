"""What `balance-shim env`, `plan` and the out-of-memory advice print in Chinese."""

import ast
import copy
import io
import json
import pickle
import string
from pathlib import Path
from typing import get_args

import pytest

from balance_shim.cli.main import main
from balance_shim.language.chinese import MESSAGES
from balance_shim.language.message import Joined, Message
from balance_shim.language.speaker import language_of, speaker
from balance_shim.memory.cost import TERMS
from balance_shim.monitoring.out_of_memory import Phase
from balance_shim.report.table import table, width_of
from tests import models, processes
from tests.cli.running import MACHINE, QUIET

PACKAGE = Path(__file__).parent.parent / "shim" / "balance_shim"
CALLS = {"Message": 0, "_message": 0, "Joined": 0}


def made():
    """Yield the first argument of each call that makes a message, and where it is."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "id", None)
            if isinstance(node, ast.Call) and name in CALLS and node.args and path.parent.name != "language":
                yield node.args[0], f"{path.name}:{node.lineno}"


def test_every_message_has_a_chinese_one_with_the_same_fields():
    """Each template is a literal, which the catalogue has; so are terms and phases."""
    templates = set()
    for argument, where in made():
        if where.startswith("settings.py") and isinstance(argument, ast.Name):
            continue  # `_message` itself
        assert isinstance(argument, ast.Constant), where
        assert argument.value in MESSAGES, f"{where}: {argument.value!r}"
        templates.add(argument.value)
    assert len(templates) > 80 and {*TERMS, *get_args(Phase)} <= MESSAGES.keys()
    for english, chinese in MESSAGES.items():
        assert fields(english) == fields(chinese), english


def fields(template):
    return sorted(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)


def test_no_message_is_left_over():
    """Each entry of the catalogue is a text of the package."""
    texts = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "language":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert set(MESSAGES) <= texts


LOCALES = {
    "nothing": ({}, "en"),
    "LANG": ({"LANG": "zh_CN.UTF-8"}, "zh"),
    "Taiwan": ({"LANG": "zh_TW"}, "zh"),
    "without a country": ({"LANG": "zh"}, "zh"),
    "LC_ALL first": ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
    "LC_MESSAGES before LANG": ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
    "an empty one does not count": ({"LC_ALL": "", "LANG": "zh_CN.UTF-8"}, "zh"),
    "Zhuang is another language": ({"LANG": "za_CN.UTF-8"}, "en"),
}


@pytest.mark.parametrize("name", LOCALES)
def test_the_locale_chooses(name):
    """By the variables of POSIX, in their order; `BALANCE_LANG` overrides them."""
    environ, expected = LOCALES[name]
    assert language_of(environ) == expected
    assert language_of(environ, "zh") == "zh" and language_of(environ, "en") == "en"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "说明"), ("gbk", "说明"), ("ascii", "note"), ("latin-1", "note")]
)
def test_a_terminal_without_chinese_gets_english(encoding, shown):
    """UTF-8 and GBK show it; others would raise."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert speaker("zh", stream)(Message("note: {note}", note="x")).startswith(shown)
    assert speaker("zh", None)("nothing") == "nothing"


def test_a_message_is_its_english_text():
    """Files and comparisons see a `str`; copies keep what is translated, braces in values included."""
    inner = Joined(", ", [Message("nothing"), "{x}"])
    message = Message("note: {note}", note=inner)
    say = speaker("zh", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    for copied in (message, copy.deepcopy(message), pickle.loads(pickle.dumps(message))):
        assert copied == "note: nothing, {x}" and json.dumps(copied) == '"note: nothing, {x}"'
        assert say(copied) == "说明：无、{x}"


def test_tables_are_aligned():
    """A Chinese character takes two cells."""
    lines = table(["设备", "峰值"], [["cuda:0", "1.0"], ["设备甲", "10.25"]]).splitlines()
    assert len({width_of(line) for line in lines}) == 1 and width_of("峰值") == 4


def test_env_speaks_chinese(monkeypatch, capsys):
    """Variables, their values and a bad one; the language itself is validated in one line."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    monkeypatch.setenv("BALANCE_SEQ_LEN", "x")
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    assert "BALANCE_MONITOR（未设置：0）\n    记录每一步的显存，增长时发出警告\n    可选值：1 或 0\n" in output
    assert "警告：BALANCE_SEQ_LEN='x' 不是有效取值，可选：不小于 1 的整数；使用默认值" in output
    monkeypatch.setenv("BALANCE_LANG", "en")
    assert main(["env"]) == 0
    assert "BALANCE_MONITOR (not set: 0)\n    record the memory" in capsys.readouterr().out
    monkeypatch.setenv("BALANCE_LANG", "fr")
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    assert (
        output.count("BALANCE_LANG='fr'") == 1 and "警告：BALANCE_LANG='fr' 不是有效取值，可选：en、zh 之一" in output
    )


def test_env_on_a_terminal_that_shows_ascii_only():
    """It neither fails nor prints escapes."""
    variables = {"LANG": "zh_CN.GBK", "PYTHONIOENCODING": "ascii"}
    done = processes.python("-m", "balance_shim", "env", **variables)
    assert done.returncode == 0 and done.stdout.isascii() and "\\u" not in done.stdout and "allowed: " in done.stdout


def test_plan_speaks_chinese(tmp_path):
    """Text of plans that fit and of plans that do not is Chinese and aligned; JSON is the English one."""
    on_meta = models.llama()
    on_meta.config.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    runs = [
        (["--gpus", MACHINE, "--seq-len", "64"], "zh"),
        (["--gpus", "2x2MiB+2x3MiB"], "zh"),
        (["--gpus", MACHINE, "--seq-len", "64", "--json"], "zh"),
        (["--gpus", MACHINE, "--seq-len", "64", "--json"], "en"),
    ]
    output = processes.output_of(
        f"""
        import contextlib, io, json, os, sys
        from balance_shim.cli.main import main
        found = []
        for words, language in {runs!r}:
            os.environ["BALANCE_LANG"] = language
            output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
            with contextlib.redirect_stdout(output):
                code = main(["plan", {str(tmp_path / "model")!r}, *words])
            found.append((code, output.buffer.getvalue().decode()))
        print(json.dumps(found))
        """,
        BALANCE_MODE="off",
        **QUIET,
    )
    fits, too_small, json_in_chinese, in_english = json.loads(output.splitlines()[-1])
    assert fits[0] == 0 and too_small[0] == 1
    assert "\n放得下\n" in fits[1] and "transformers 的 auto 在同样的设备上" in fits[1]
    assert "预测放不下" in too_small[1] and "说明：序列长度未知" in too_small[1]
    rows = [line for line in fits[1].splitlines() if line.startswith("  ")]
    header = "设备、block、权重、梯度、优化器、激活值、临时、额外开销、峰值、容量、占用、已保留"
    assert rows[0].split() == header.split("、")
    assert len({width_of(row) for row in rows[:5]}) == 1
    assert json_in_chinese == in_english and in_english[1].isascii()
