"""The options of `balance-shim plan`, with variables as defaults, parsed into `PlanOptions`."""

import argparse
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from .choices import Precision
from .device_spec import FORMS, SimulationSpec, parse_spec
from .errors import UsageError
from .setting_values import Reserve
from .settings import VARIABLES, Settings, misspelled

_MODEL = "a folder with a config.json, such a file, or a hub id"
PRECISIONS: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_CHECKPOINTING = ("1", "true", "yes", "on", "0", "false", "no", "off", "auto")
_BY_NAME = {variable.name: variable for variable in VARIABLES}

DESCRIPTION = """\
Plan the training of a model on devices that need not exist: the device map, the predicted peak of each device, the
distance from the lower bound for any map, and the same for transformers' own "auto". A config is enough: no weights
are read, and no accelerator is needed.

BALANCE_* variables set the defaults of the options of the same name, BALANCE_SIMULATE that of --gpus; BALANCE_RESERVE,
BALANCE_MAX_MEMORY and BALANCE_CACHE apply as in training.
"""
EXIT_CODES = "Exit code: 0 if the plan fits, 1 if it does not, 2 if the request is invalid or no plan exists."


class PlanOptions(NamedTuple):
    """The options of a plan.

    Attributes:
        model: a folder with a config.json, such a file, or a hub id.
        machine: the devices.
        settings: workload, caps, reserve and cache, as the shim has them in training.
        accumulation: micro-batches before an optimizer step.
        precision: a key of `PRECISIONS`; None: the config's dtype.
        as_json: whether to print one JSON object instead of tables.
        output: where to write the device map; None: nowhere.
        picture: where to draw the plan; None: nowhere.
        trust_remote_code: whether code that comes with the model may run.
        mode: what to plan: a balanced map, or whatever mode `auto` would choose.
        replicas: how many are trained, each on its share of the devices; "auto": the most that fit.
    """

    model: str
    machine: SimulationSpec
    settings: Settings
    accumulation: int = 1
    precision: Precision | None = None
    as_json: bool = False
    output: str | None = None
    picture: str | None = None
    trust_remote_code: bool = False
    replicas: int | str = 1
    mode: Literal["balanced", "auto"] = "balanced"

    @property
    def chooses_remedy(self) -> bool:
        """Whether to plan the remedy that mode `auto` would choose."""
        return self.mode == "auto"


class _Option(NamedTuple):
    """One option: how its value is parsed, and the variable that is its default."""

    flag: str
    variable: str | None
    parse: Callable[[str], Any]
    allowed: str
    meaning: str

    @property
    def field(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


def _key_of(allowed: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError
        return text.lower()

    return parse


def _output(text: str) -> str:
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        raise UsageError("is a folder")
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise UsageError(f"cannot be written: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"cannot be written: no permission in {folder}")
    return path


def _like(name: str, flag: str, meaning: str) -> _Option:
    variable = _BY_NAME[name]
    return _Option(flag, name, variable.parse, variable.allowed, meaning)


_OPTIONS = (
    _Option("--gpus", "BALANCE_SIMULATE", parse_spec, FORMS, "the devices, such as 4x24GiB, 8xH100 or 4x20GiB@RTX4090"),
    _like("BALANCE_BATCH_SIZE", "--batch-size", "sequences per micro-batch (1)"),
    _like("BALANCE_SEQ_LEN", "--seq-len", "tokens per sequence (2048, or the model's maximum)"),
    _Option("--accumulation", None, _BY_NAME["BALANCE_BATCH_SIZE"].parse, "a whole number from 1",
            "micro-batches before an optimizer step (1)"),
    _like("BALANCE_TUNING", "--tuning", "parameters that train: full, lora, or frozen (all but towers) (full)"),
    _like("BALANCE_OPTIMIZER", "--optimizer", "as in TrainingArguments(optim=...) (adamw_torch)"),
    _Option("--precision", "BALANCE_PRECISION", _key_of(PRECISIONS), "one of " + ", ".join(PRECISIONS),
            "dtype of the loaded weights (the config's, else bf16)"),
    _like("BALANCE_GRADIENT_CHECKPOINTING", "--gradient-checkpointing",
          "recompute layers in the backward pass: 1 all, 0 none, auto as few as fit; without a value 1 (0)"),
    _like("BALANCE_LOSS", "--loss", "chunked or full: the loss of causal models with or without full logits (chunked)"),
    _like("BALANCE_REPLICAS", "--replicas", "data-parallel replicas, each on its share of the devices, or auto (1)"),
    _like("BALANCE_PIPELINE", "--pipeline", "micro-batches of an accumulation in flight: a number, auto or off (off)"),
    _Option("--mode", None, _key_of(("balanced", "auto")), "balanced or auto",
            "a balanced map, or the fastest of all remedies that fit, with a table of them (balanced)"),
    _Option("--output", None, _output, "the path of a file",
            "write the device map there, for device_map=json.load(...), BALANCE_DEVICE_MAP, and ms-swift"),
    _Option("--picture", None, _output, "the path of a file",
            "draw the terms on each device there as SVG, under transformers' auto and under the plan"),
)  # fmt: skip
_SETTINGS = ("BALANCE_RESERVE", "BALANCE_MAX_MEMORY", "BALANCE_CACHE", "BALANCE_LANG")


def read_options(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[PlanOptions, list[str]]:
    """Return the options of the command line, with variables as defaults, and the warnings, one line each.

    Raises:
        UsageError: a line for each thing that cannot be used.
        SystemExit: help was asked for.
    """
    arguments = _parse(argv)
    values: dict[str, Any] = {}
    faults: list[str] = []
    for option in _OPTIONS:
        name, text = option.flag, getattr(arguments, option.field)
        if text is None and option.variable is not None:
            name, text = option.variable, environ.get(option.variable, "").strip() or None
        if text is not None:
            _read_into(values, faults, option.field, name, text.strip(), option.parse, option.allowed)
    for name in _SETTINGS:
        text = environ.get(name, "").strip()
        if text:
            _read_into(values, faults, _BY_NAME[name].field, name, text, _BY_NAME[name].parse, _BY_NAME[name].allowed)
    if "gpus" not in values and not any("gpus" in fault or "BALANCE_SIMULATE" in fault for fault in faults):
        faults.append(f"--gpus is needed: {FORMS}")
    faults += _absent_devices(values)
    faults += _too_many_replicas(values)
    faults += _overwritten_config(arguments.model, "--output", values.get("output"))
    faults += _overwritten_config(arguments.model, "--picture", values.get("picture"))
    if faults:
        raise UsageError("\n".join(faults))
    settings = Settings(
        max_memory=values.get("max_memory"),
        reserve=values.get("reserve", Settings().reserve),
        batch_size=values.get("batch_size"),
        seq_len=values.get("seq_len"),
        tuning=values.get("tuning"),
        optimizer=values.get("optimizer"),
        gradient_checkpointing=values.get("gradient_checkpointing"),
        loss=values.get("loss", Settings().loss),
        pipeline=values.get("pipeline", Settings().pipeline),
        cache=values.get("cache", Settings().cache),
        lang=values.get("lang"),
    )
    options = PlanOptions(
        model=arguments.model,
        machine=values["gpus"],
        settings=settings,
        accumulation=values.get("accumulation", 1),
        precision=values.get("precision"),
        as_json=arguments.json,
        output=values.get("output"),
        picture=values.get("picture"),
        trust_remote_code=arguments.trust_remote_code,
        replicas=values.get("replicas", 1),
        mode=values.get("mode", "balanced"),
    )
    warnings = _unknown_variables(environ)
    if options.chooses_remedy and options.replicas != 1:
        warnings.append(
            "the number of replicas is ignored: --mode auto chooses it (in a training, BALANCE_REPLICAS wins)"
        )
    return options, warnings


def _overwritten_config(model: str, flag: str, output: str | None) -> list[str]:
    place = os.path.expanduser(model)
    inputs = {os.path.realpath(path) for path in (place, os.path.join(place, "config.json"))}
    if output is None or os.path.realpath(output) not in inputs:
        return []
    return [f"{flag}={output!r} is the model's own config, which must not be overwritten"]


def _absent_devices(values: Mapping[str, Any]) -> list[str]:
    caps, machine = values.get("max_memory"), values.get("gpus")
    if machine is None or not isinstance(caps, dict):
        return []
    number = len(machine.capacities)
    return [f"BALANCE_MAX_MEMORY names device {index}, but there are {number}" for index in caps if index >= number]


def _too_many_replicas(values: Mapping[str, Any]) -> list[str]:
    count, machine = values.get("replicas"), values.get("gpus")
    if machine is None or not isinstance(count, int) or count <= len(machine.capacities):
        return []
    return [f"--replicas={count}: each replica needs a device, and there are {len(machine.capacities)}"]


def reserve_text(reserve: Reserve) -> str:
    """Return a reserve for people: "8%", "2.0 GiB", or "8%, at least 768.0 MiB"."""
    from .language.message import Message
    from .units import format_size

    if reserve.fixed:
        return format_size(reserve.fixed)
    share = f"{reserve.fraction:.0%}"
    if not reserve.least:
        return share
    return Message("{share}, at least {least},", share=share, least=format_size(reserve.least))


def _read_into(
    values: dict[str, Any],
    faults: list[str],
    field: str,
    name: str,
    text: str,
    parse: Callable[[str], Any],
    allowed: str,
) -> None:
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    try:
        values[field] = parse(text)
    except UsageError as error:
        faults.append(f"{name}={shown!r} {error}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # The parser of machines names the fault and the allowed forms itself.
        faults.append(f"{name} {error}" if parse is parse_spec else f"{name}={shown!r} is not {allowed}")


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each variable that looks like a misspelled one of ours."""
    names = {*_BY_NAME, *(option.variable for option in _OPTIONS)}
    remaining = {name: text for name, text in environ.items() if name.startswith("BALANCE_") and name not in names}
    return [f"{fault}; it is ignored" for _, fault in misspelled(remaining)]


def _with_bare_checkpointing(argv: Sequence[str]) -> list[str]:
    """Return `argv` with `--gradient-checkpointing` spelled out where it stands alone: MODEL may come behind it."""
    spelled = []
    for position, argument in enumerate(argv):
        following = argv[position + 1].lower() if position + 1 < len(argv) else ""
        is_value = following in _CHECKPOINTING or following.isdigit()
        bare = argument == "--gradient-checkpointing" and not is_value
        spelled.append(f"{argument}=1" if bare else argument)
    return spelled


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line's values as texts; `argparse` alone would print its usage ahead of each error."""
    parser = _parser()
    try:
        arguments, unknown = parser.parse_known_args(_with_bare_checkpointing(argv))
    except argparse.ArgumentError as error:
        allowed = next((option.allowed for option in _OPTIONS if option.flag == error.argument_name), None)
        needs = f"needs a value: {allowed}" if allowed is not None else f"takes no value: {error.message}"
        raise UsageError(f"{error.argument_name} {needs}") from None
    if unknown:
        options = ", ".join(sorted(option for option in parser._option_string_actions if option.startswith("--")))
        raise UsageError(f"cannot use {' '.join(unknown)!r}; there is one MODEL, and the options are {options}")
    if arguments.model is None:
        raise UsageError(f"MODEL is needed: {_MODEL}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="balance-shim plan",
        usage="balance-shim plan MODEL --gpus DEVICES [options]",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=_MODEL)
    for option in _OPTIONS:
        shown = "DEVICES" if option.flag == "--gpus" else "FILE" if option.parse is _output else "VALUE"
        parser.add_argument(option.flag, metavar=shown, help=option.meaning.replace("%", "%%"))
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes, and nothing else")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")
    return parser
