"""What `balance-shim plan` makes of bad words, values and models: one line each."""

import json

import pytest

from tests.cli.running import (
    MACHINE,
    SHORT,
    plan,
    together,
)


def test_a_missing_package_of_a_quantizer_is_named_in_one_line(saved, tmp_path):
    """A config that needs a package that is not there is refused with one line that names it."""
    config = json.loads((saved / "llama" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "nbits": 4, "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = plan(tmp_path, "--gpus", MACHINE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "hqq" in done.stderr.lower(), done.stderr


BAD_ARGUMENTS = {
    "no model": ((), "MODEL is needed"),
    "no devices": (("x",), "--gpus is needed: write devices x size"),
    "devices": (("x", "--gpus", "4"), "--gpus '4': a device has at least 1 MiB"),
    "devices without a value": (("x", "--gpus"), "--gpus needs a value: write devices x size"),
    "replicas": (
        ("x", "--gpus", "1x1GiB", "--replicas", "all"),
        "--replicas='all' is not a whole number from 1, or auto",
    ),
    "too many replicas": (("x", "--gpus", "2x1GiB", "--replicas", "3"), "--replicas=3: each replica needs a device"),
    "number": (("x", "--gpus", "1x1GiB", "--seq-len", "0"), "--seq-len='0' is not a whole number from 1"),
    "tuning": (("x", "--gpus", "1x1GiB", "--tuning", "qlora"), "'qlora' is not one of full, lora, frozen"),
    "optimizer": (
        ("x", "--gpus", "1x1GiB", "--optimizer", "adam"),
        "--optimizer='adam' is not a name as in TrainingArguments(optim=...)",
    ),
    "precision": (("x", "--gpus", "1x1GiB", "--precision", "int8"), "'int8' is not one of bf16, fp16, fp32"),
    "checkpointing": (("x", "--gpus", "1x1GiB", "--gradient-checkpointing=some"), "'some' is not 1, 0 or auto"),
    "checkpointing with a number": (
        ("--gradient-checkpointing", "2", "x", "--gpus", "1x1GiB"),
        "'2' is not 1, 0 or auto",
    ),
    "option": (("x", "--gpus", "1x1GiB", "--foo"), "cannot use '--foo'; there is one MODEL, and the options are"),
    "abbreviation": (("x", "--gpus", "1x1GiB", "--seq", "4"), "cannot use '--seq 4'"),
    "folder to write": (("x", "--gpus", "1x1GiB", "--output", "/"), "--output='/' is a folder"),
    "nowhere to write": (("x", "--gpus", "1x1GiB", "--output", "/no/such/map.json"), "there is no folder /no/such"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_get_one_line_with_what_is_allowed(case):
    """Bad usage is exit code 2, nothing on standard output, and one line that says what would be right."""
    arguments, line = BAD_ARGUMENTS[case]
    done = plan(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and line in done.stderr


def test_each_bad_value_gets_its_line():
    """Several bad values, of options and of variables, are all told at once; what an option overrides is not read."""
    arguments = ("x", "--gpus", "1x1GiB", "--seq-len", "x", "--batch-size", "1")
    done = plan(*arguments, BALANCE_TUNING="some", BALANCE_BATCH_SIZE="y", BALANCE_MAX_MEMORY="3=1GiB")
    lines = [line.partition(": ")[2] for line in done.stderr.splitlines()]
    assert done.returncode == 2
    assert [line.partition("=")[0].partition(" ")[0] for line in lines] == [
        "--seq-len", "BALANCE_TUNING", "BALANCE_MAX_MEMORY",
    ]  # fmt: skip


BAD_MODELS = {
    "missing": (None, "no such file"),
    "empty": ({}, "names no model_type"),
    "unknown type": ({"model_type": "zork"}, "does not know its model type 'zork'"),
    "unknown class": ({"model_type": "clip_text_model", "architectures": ["ZorkModel"]}, "has no class ZorkModel"),
    "not JSON": ("{", "not JSON, line 1 column 2"),
    "not an object": ([], "a config is a JSON object"),
    "impossible": ({"model_type": "llama", "hidden_size": "wide", "architectures": ["LlamaForCausalLM"]}, "str"),
}


def test_bad_models_get_one_line(tmp_path):
    """A model that cannot be had is exit code 2 and one line with its name and what is wrong."""
    files = [tmp_path / f"{case}.json" for case in BAD_MODELS]
    for file, (content, _) in zip(files, BAD_MODELS.values(), strict=True):
        if content is not None:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    done = together(*((file, "--gpus", "2x1GiB") for file in files))
    for file, (_, line), (code, output, errors) in zip(files, BAD_MODELS.values(), done, strict=True):
        assert (code, output) == (2, "")
        assert errors.count("\n") == 1 and str(file) in errors and line in errors, errors


def test_a_hub_id_that_is_not_in_the_cache_gets_one_line(tmp_path):
    """Offline, a hub id that nobody has fetched is exit code 2 and one line."""
    done = plan("nobody/nothing", "--gpus", "2x1GiB", HF_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "nor in the cache of the hub; the hub cannot be reached" in done.stderr


def test_an_unwritable_output_gets_one_line(saved):
    """A folder in which nobody may make files is exit code 2 and one line, though the plan is printed."""
    done = plan(saved / "llama", "--gpus", MACHINE, *SHORT, "--output", "/proc/map.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "/proc/map.json" in done.stderr
