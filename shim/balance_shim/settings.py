"""`BALANCE_*` variables -> `Settings`: read once, while arming, and never changed afterwards.

Standard library only, and of that only what an interpreter has mostly loaded anyway: arming must cost next to nothing.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

from .choices import LossSetting, Mode, Offload, Precision, Tuning
from .errors import DeviceMapError, SettingError
from .log import LEVELS
from .units import GIB, MIB, SIZE_FORMS, parse_size

if TYPE_CHECKING:
    from .device_spec import SimulationSpec
    from .map_file import UserMap

MODES: tuple[Mode, ...] = get_args(Mode)
INTERCEPTABLE = ("auto", "balanced", "balanced_low_0", "sequential", "none")
TUNINGS: tuple[Tuning, ...] = get_args(Tuning)
LOSSES: tuple[LossSetting, ...] = get_args(LossSetting)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
BALANCED_VARIABLES = ("BALANCE_REPLICAS",)
ZERO_VARIABLES = ("BALANCE_ZERO_CONFIG", "BALANCE_OFFLOAD", "BALANCE_NPROC", "BALANCE_NCCL_TIMEOUT")


class Reserve(NamedTuple):
    """Head-room kept free on each device: a fixed number of bytes plus a fraction of the device's capacity.

    `least` is the least that is kept free on real CUDA devices: kernels that are loaded once they run, cuDNN, and what
    varied lengths fragment do not shrink with the card.
    """

    fixed: int = 0
    fraction: float = 0.0
    least: int = 0

    def of(self, capacity: int, has_runtime: bool = False) -> int:
        """Return the bytes to keep free on a device of `capacity` bytes.

        Args:
            has_runtime: whether a CUDA runtime shares the device; none does with simulated ones.
        """
        size = self.fixed + int(self.fraction * capacity)
        if has_runtime and capacity >= SMALLEST_CARD:
            size = max(size, min(self.least, int(LARGEST_LEAST * capacity)))
        return min(capacity, size)


SMALLEST_CARD = 2 * GIB  # no CUDA device in use is smaller; a plan for less is a trial
LARGEST_LEAST = 0.2  # of a device: on one so small little would be left, and little runs on it
DEFAULT_RESERVE = Reserve(fraction=0.08, least=768 * MIB)


class Settings(NamedTuple):
    """What the user asked for. Sizes in bytes; `None` where the user left it to the shim.

    `cache` is a folder, "" for the usual one, and None for no cache. `nccl_timeout` is in seconds.
    """

    mode: Mode = "balanced"
    intercept: frozenset[str] = frozenset({"auto", "balanced"})
    device_map: "UserMap | None" = None
    max_memory: int | dict[int, int] | None = None
    reserve: Reserve = DEFAULT_RESERVE
    batch_size: int | None = None
    seq_len: int | None = None
    tuning: Tuning | None = None
    optimizer: str | None = None
    precision: Precision | None = None
    gradient_checkpointing: bool | str | None = None
    micro_batch: int | str | None = None
    monitor: bool = False
    rebalance: bool = False
    loss: LossSetting = "auto"
    zero_config: dict[str, Any] | None = None
    offload: Offload = "none"
    nproc: int | None = None
    replicas: int | str = 1
    nccl_timeout: int | None = None
    report: str = "text"
    cache: str | None = ""
    simulate: "SimulationSpec | None" = None
    strict: bool = False
    log_level: str = "info"

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the mode trains with DeepSpeed, in several processes."""
        return self.mode == "zero3"


class Variable(NamedTuple):
    """One `BALANCE_*` variable: how it is read, and what `balance-shim env` and docs/variables.md show."""

    name: str
    field: str
    parse: Callable[[str], Any]
    allowed: str
    default: str
    meaning: str


class SettingProblem(NamedTuple):
    """A value that cannot be used. `message` is the whole line; `fatal` when an explicit request would be ignored."""

    variable: str
    message: str
    fatal: bool


_Choice = TypeVar("_Choice", bound=str)


def _one_of(allowed: tuple[_Choice, ...]) -> Callable[[str], _Choice]:
    def parse(text: str) -> _Choice:
        for choice in allowed:
            if text.lower() == choice:
                return choice
        raise ValueError

    return parse


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}[
        text.lower()
    ]


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number < 2**31:
        raise ValueError
    return number


def _count_or_auto(text: str) -> int | str:
    return "auto" if text.lower() == "auto" else _count(text)


def _intercept(text: str) -> frozenset[str]:
    values = frozenset(part.strip().lower() for part in text.split(","))
    if not values <= set(INTERCEPTABLE):
        raise ValueError
    return values


def _device_index(text: str) -> int:
    """Read "1", "cuda:1" or "npu:1"."""
    kind, _, index = text.strip().rpartition(":")
    if not index.isdigit() or not (kind.isalpha() or not kind):
        raise ValueError
    return int(index)


def _max_memory(text: str) -> int | dict[int, int] | None:
    if text.startswith("{"):
        import json

        pairs = json.loads(text, object_pairs_hook=list)
    elif "=" in text:
        pairs = [part.split("=") for part in text.split(",")]
    else:
        return parse_size(text)
    # accelerate's max_memory carries "cpu" and "disk" too; a plan never spills there, so they say nothing here.
    # As in accelerate, 0 keeps a device free.
    sizes = [(key.strip(), 0 if str(size).strip() == "0" else parse_size(str(size))) for key, size in pairs]
    caps = [(_device_index(key), size) for key, size in sizes if key not in ("cpu", "disk")]
    if not sizes or len(dict(caps)) != len(caps):
        raise ValueError
    return dict(caps) or None


def _reserve(text: str) -> Reserve:
    if text.endswith("%"):
        percent = float(text[:-1])
        if not 0 <= percent < 100:
            raise ValueError
        return Reserve(fraction=percent / 100)
    return Reserve(fixed=0 if text == "0" else parse_size(text))


def _report(text: str) -> str:
    if text.lower() in ("text", "off"):
        return text.lower()
    folder = os.path.abspath(os.path.expanduser(text))
    there = folder
    while not os.path.lexists(there):  # what does not exist yet is made when there is something to report
        there = os.path.dirname(there)
    if not (os.path.isdir(there) and os.access(there, os.W_OK)):
        raise ValueError
    return folder


def _optimizer(text: str) -> str:
    from .optimizers import OPTIMIZERS

    return _one_of(tuple(OPTIMIZERS))(text)


def _checkpointing(text: str) -> bool | str:
    return "auto" if text.lower() == "auto" else _flag(text)


def _cache(text: str) -> str | None:
    if text.lower() == "off":
        return None
    folder = os.path.abspath(os.path.expanduser(text))
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ValueError
    return folder


def _device_map(text: str) -> "UserMap":
    from . import map_file  # needs json: only those who bring a map pay for it

    return map_file.read(text)


def _zero_config(text: str) -> dict[str, Any]:
    from . import zero_config_file  # needs json

    return zero_config_file.read(text)


def _simulate(text: str) -> "SimulationSpec":
    from .device_spec import parse_spec

    return parse_spec(text)


VARIABLES = (
    Variable("BALANCE_MODE", "mode", _one_of(MODES), "one of " + ", ".join(MODES), "balanced",
             "the remedy; a misspelled mode turns the shim off and is reported"),
    Variable("BALANCE_INTERCEPT", "intercept", _intercept, "a comma list of " + ", ".join(INTERCEPTABLE),
             "auto,balanced",
             "the `device_map` values to replace; explicit maps are always kept. `none` is no `device_map` at "
             "all: on N CUDA devices such a script would train N copies (`torch.nn.DataParallel`) with N times "
             "the batch, and trains one copy then; a line names both batches"),
    Variable("BALANCE_DEVICE_MAP", "device_map", _device_map, "the path of a JSON file, or JSON", "",
             "your own map, layer name -> device; alone it implies mode `map`"),
    Variable("BALANCE_MAX_MEMORY", "max_memory", _max_memory, f"{SIZE_FORMS}, 0=20GiB,1=45GiB, or JSON",
             "what is free",
             "limit for each device; `2=0` excludes a device, and does not query its memory. `cpu` and `disk` "
             "are accepted for compatibility and ignored"),
    Variable("BALANCE_RESERVE", "reserve", _reserve, f"{SIZE_FORMS}, or a percentage below 100%",
             "8%, on CUDA devices at least 768 MiB",
             "memory that plans keep free on each device, by default at most a fifth of it; what torch's "
             "allocator is predicted to reserve has to fit too"),
    Variable("BALANCE_BATCH_SIZE", "batch_size", _count, "a whole number from 1", "the Trainer's, else 1",
             "micro-batch to assume until the Trainer is known"),
    Variable("BALANCE_SEQ_LEN", "seq_len", _count, "a whole number from 1", "the Trainer's, else 2048",
             "tokens per sequence to assume until the first batch; decides activations and logits. Set it if the "
             "first batch is much shorter than later ones"),
    Variable("BALANCE_TUNING", "tuning", _one_of(TUNINGS), "one of " + ", ".join(TUNINGS), "full",
             "parameters that train: all, adapters, or all but vision and audio towers"),
    Variable("BALANCE_OPTIMIZER", "optimizer", _optimizer,
             "a name as in TrainingArguments(optim=...), such as adamw_torch, adamw_8bit or adafactor",
             "the Trainer's, else adamw_torch",
             "optimizer to assume until the Trainer is known"),
    Variable("BALANCE_PRECISION", "precision", _one_of(PRECISIONS), "one of " + ", ".join(PRECISIONS), "the script's",
             "dtype of the loaded weights and mixed precision of training"),
    Variable("BALANCE_MICRO_BATCH", "micro_batch", _count_or_auto, "a whole number from 1, or auto", "the script's",
             "sequences per micro-batch, or the most that are predicted to fit; accumulation keeps the effective "
             "batch"),
    Variable("BALANCE_GRADIENT_CHECKPOINTING", "gradient_checkpointing", _checkpointing, "1, 0 or auto",
             "the script's",
             "recompute activations in all layers, in none, or in as few as fit"),
    Variable("BALANCE_MONITOR", "monitor", _flag, "1 or 0", "0",
             "record the memory of each step, and warn when it grows"),
    Variable("BALANCE_REBALANCE", "rebalance", _flag, "1 or 0", "0",
             "move blocks between steps if the first steps need other memory than planned"),
    Variable("BALANCE_LOSS", "loss", _one_of(LOSSES), "one of " + ", ".join(LOSSES), "auto",
             "compute the loss of causal models in chunks, without full logits: in models that the shim has "
             "placed, in any that a Trainer trains, or in none"),
    Variable("BALANCE_REPLICAS", "replicas", _count_or_auto, "a whole number from 1, or auto", "1",
             "mode `balanced`: data-parallel replicas to train, each on its own share of the devices; `auto`: the most "
             "that fit. Under a launcher the number of its processes on this machine decides"),
    Variable("BALANCE_ZERO_CONFIG", "zero_config", _zero_config, "the path of a DeepSpeed JSON file, or JSON", "",
             "mode `zero3`: merged over the shim's own DeepSpeed config"),
    Variable("BALANCE_OFFLOAD", "offload", _one_of(OFFLOADS), "one of " + ", ".join(OFFLOADS), "none",
             "mode `zero3`: keep optimizer state, or weights too, in host memory"),
    Variable("BALANCE_NPROC", "nproc", _count, "a whole number from 1", "one for each device",
             "mode `zero3`: processes to start on this machine; CPU processes if it has no device"),
    Variable("BALANCE_NCCL_TIMEOUT", "nccl_timeout", _count, "seconds, a whole number from 1",
             "the script's `ddp_timeout`, else 1800",
             "mode `zero3`: how long ranks wait for each other in a collective operation"),
    Variable("BALANCE_REPORT", "report", _report, "text, off, or a folder that can be written", "text",
             "where plan and map go: standard error, nowhere, or also `plan.json` and `device_map.json` in a "
             "folder"),
    Variable("BALANCE_SIMULATE", "simulate", _simulate, "devices such as 4x24GiB, 2x80GiB+2x24GiB or 4xRTX4090", "",
             "run on simulated devices, also named as in `2xA100-40GB+2xT4` or `4x20GiB@RTX4090`; `:shapes` at "
             "the end simulates shapes only. With a report folder, `simulation.json` has their peaks"),
    Variable("BALANCE_CACHE", "cache", _cache, "a folder, or off", "~/.cache/balance_shim",
             "where profiles and repairs of models are kept"),
    Variable("BALANCE_STRICT", "strict", _flag, "1 or 0", "0",
             "an internal failure, or any bad value, stops the program"),
    Variable("BALANCE_LOG_LEVEL", "log_level", _one_of(LEVELS), "one of " + ", ".join(LEVELS), "info",
             "least severe messages to log"),
)  # fmt: skip


def read(environ: Mapping[str, str], default_mode: str = "balanced") -> tuple[Settings, tuple[SettingProblem, ...]]:
    """Return the settings that `environ` asks for, and each value in it that cannot be used.

    A bad value leaves its field at the default, except that a bad `BALANCE_MODE` leaves the shim off. A problem is
    fatal when continuing would ignore an explicit request, and each one is when `BALANCE_STRICT` is set.
    """
    fields: dict[str, Any] = {"mode": default_mode}
    faults: list[tuple[str, str, str, bool]] = []  # variable, fault, consequence, fatal
    if environ.get("BALANCE_DEVICE_MAP", "").strip():
        fields["mode"] = "map"  # unless BALANCE_MODE, which is read next, says otherwise
    for variable in VARIABLES:
        text = environ.get(variable.name, "").strip()
        if not text:  # set but empty is how shells and YAML files write "not set"
            continue
        if variable.name == "BALANCE_DEVICE_MAP" and fields["mode"] not in ("map", "auto"):
            continue  # not used, so not read: it may be a file of another machine
        only = "zero3" if variable.name in ZERO_VARIABLES else "balanced" if variable.name in BALANCED_VARIABLES else ""
        if only and fields["mode"] != only:
            faults.append((variable.name, f"{variable.name} is for BALANCE_MODE={only} only", "it is ignored", False))
            continue
        try:
            fields[variable.field] = variable.parse(text)
        except DeviceMapError as error:
            faults.append((variable.name, str(error), "no model will be loaded with this map", True))
        except SettingError as error:
            faults.append((variable.name, str(error), "no model will be loaded", True))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError, RecursionError):
            fatal = variable.name == "BALANCE_SIMULATE"
            if variable.name == "BALANCE_MODE":
                fields["mode"], now = "off", "the shim stays off"
            elif fatal:
                now = "nothing is simulated and the program stops before it touches a device"
            else:
                now = f"using the default ({variable.default})"
            fault = f"{variable.name}={_shortened(text)!r} is not {variable.allowed}"
            faults.append((variable.name, fault, now, fatal))

    mode = fields["mode"]
    if mode == "map" and not environ.get("BALANCE_DEVICE_MAP", "").strip():
        text = "BALANCE_MODE=map needs BALANCE_DEVICE_MAP, the path of a JSON file or JSON"
        faults.append(("BALANCE_DEVICE_MAP", text, "no model will be loaded", True))
    elif mode in ("balanced", "zero3") and environ.get("BALANCE_DEVICE_MAP", "").strip():
        text = f"BALANCE_DEVICE_MAP is set but BALANCE_MODE={mode}"
        faults.append(("BALANCE_DEVICE_MAP", text, "the map is not used (BALANCE_MODE=map uses it)", False))

    faults += [(name, fault, "it is ignored", False) for name, fault in misspelled(environ)]
    strict = bool(fields.get("strict", False))
    problems = []
    for name, fault, consequence, fatal in faults:
        consequence = "BALANCE_STRICT stops the program" if strict and not fatal else consequence
        problems.append(SettingProblem(name, f"{fault}; {consequence}", fatal or strict))
    return Settings(**fields), tuple(problems)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def misspelled(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return a (variable, fault) for each name that looks like one of ours and is not: other programs balance, too."""
    known = [variable.name for variable in VARIABLES]
    lines = []
    for name in sorted(environ):
        if not name.startswith("BALANCE_") or name in known or not environ[name].strip():
            continue
        from difflib import get_close_matches

        near = get_close_matches(name, known, n=1, cutoff=0.85)
        if near:
            lines.append((name, f"{name} is not a variable (did you mean {near[0]}?)"))
    return lines
