"""`BALANCE_*` variables -> `Settings`: read once, while arming, and never changed afterwards.

Standard library only, and only modules that an interpreter has mostly loaded anyway: arming must cost next to nothing.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from . import setting_values as parse
from .choices import Language, LossSetting, Mode, Offload, Precision, Tuning
from .errors import DeviceMapError, SettingError
from .log import LEVELS
from .setting_values import Reserve
from .units import MIB, SIZE_FORMS

if TYPE_CHECKING:
    from .device_spec import SimulationSpec
    from .map_file import UserMap

MODES: tuple[Mode, ...] = get_args(Mode)
TUNINGS: tuple[Tuning, ...] = get_args(Tuning)
LOSSES: tuple[LossSetting, ...] = get_args(LossSetting)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
LANGUAGES: tuple[Language, ...] = get_args(Language)
ZERO_VARIABLES = ("BALANCE_ZERO_CONFIG", "BALANCE_OFFLOAD", "BALANCE_NPROC", "BALANCE_NCCL_TIMEOUT")
# The variables of single modes.
MODES_OF: dict[str, tuple[Mode, ...]] = {
    **dict.fromkeys(ZERO_VARIABLES, ("zero3",)),
    "BALANCE_REPLICAS": ("balanced", "auto"),
    "BALANCE_PIPELINE": ("balanced", "map", "auto"),
}


DEFAULT_RESERVE = Reserve(fraction=0.08, least=768 * MIB)


class Settings(NamedTuple):
    """The user's settings. Sizes in bytes; `None` where the user left it to the shim.

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
    pipeline: int | str = "off"
    nccl_timeout: int | None = None
    report: str = "text"
    cache: str | None = ""
    simulate: "SimulationSpec | None" = None
    strict: bool = False
    lang: Language | None = None
    log_level: str = "info"

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the mode trains with DeepSpeed, in several processes."""
        return self.mode == "zero3"


class Variable(NamedTuple):
    """One `BALANCE_*` variable: how it is read, and the texts of `balance-shim env` and docs/variables.md."""

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


VARIABLES = (
    Variable("BALANCE_MODE", "mode", parse.one_of(MODES), "one of " + ", ".join(MODES), "balanced",
             "the remedy; `auto` predicts memory and step time of each and takes the fastest that fits; a misspelled "
             "mode turns the shim off and is reported"),
    Variable("BALANCE_INTERCEPT", "intercept", parse.intercept, "a comma list of " + ", ".join(parse.INTERCEPTABLE),
             "auto,balanced",
             "the `device_map` values to replace; explicit maps are always kept. `none` is no `device_map` at "
             "all: on N CUDA devices such a script would train N copies (`torch.nn.DataParallel`) with N times "
             "the batch, and trains one copy then; a line names both batches"),
    Variable("BALANCE_DEVICE_MAP", "device_map", parse.device_map, "the path of a JSON file, or JSON", "",
             "your own map, layer name -> device; alone it implies mode `map`"),
    Variable("BALANCE_MAX_MEMORY", "max_memory", parse.max_memory, f"{SIZE_FORMS}, 0=20GiB,1=45GiB, or JSON",
             "what is free",
             "limit for each device; `2=0` excludes a device, and does not query its memory. `cpu` and `disk` "
             "are accepted for compatibility and ignored"),
    Variable("BALANCE_RESERVE", "reserve", parse.reserve, f"{SIZE_FORMS}, or a percentage below 100%",
             "8%, on CUDA devices at least 768 MiB",
             "memory that plans keep free on each device, by default at most a fifth of it; what torch's "
             "allocator is predicted to reserve has to fit too"),
    Variable("BALANCE_BATCH_SIZE", "batch_size", parse.count, "a whole number from 1", "the Trainer's, else 1",
             "micro-batch to assume until the Trainer is known"),
    Variable("BALANCE_SEQ_LEN", "seq_len", parse.count, "a whole number from 1", "the Trainer's, else 2048",
             "tokens per sequence to assume until the first batch; decides activations and logits. Set it if the "
             "first batch is much shorter than later ones"),
    Variable("BALANCE_TUNING", "tuning", parse.one_of(TUNINGS), "one of " + ", ".join(TUNINGS), "full",
             "parameters that train: all, adapters, or all but vision and audio towers"),
    Variable("BALANCE_OPTIMIZER", "optimizer", parse.optimizer,
             "a name as in TrainingArguments(optim=...), such as adamw_torch, adamw_8bit or adafactor",
             "the Trainer's, else adamw_torch",
             "optimizer to assume until the Trainer is known"),
    Variable("BALANCE_PRECISION", "precision", parse.one_of(PRECISIONS), "one of " + ", ".join(PRECISIONS),
             "the script's",
             "dtype of the loaded weights and mixed precision of training"),
    Variable("BALANCE_MICRO_BATCH", "micro_batch", parse.count_or_auto, "a whole number from 1, or auto",
             "the script's",
             "sequences per micro-batch, or the most that are predicted to fit; accumulation keeps the effective "
             "batch"),
    Variable("BALANCE_GRADIENT_CHECKPOINTING", "gradient_checkpointing", parse.checkpointing, "1, 0 or auto",
             "the script's",
             "recompute activations in all layers, in none, or in as few as fit"),
    Variable("BALANCE_MONITOR", "monitor", parse.flag, "1 or 0", "0",
             "record the memory of each step, and warn when it grows"),
    Variable("BALANCE_REBALANCE", "rebalance", parse.flag, "1 or 0", "0",
             "move blocks between steps if the first steps need other memory than planned"),
    Variable("BALANCE_LOSS", "loss", parse.one_of(LOSSES), "one of " + ", ".join(LOSSES), "auto",
             "compute the loss of causal models in chunks, without full logits: in models that the shim has "
             "placed, in any that a Trainer trains, or in none"),
    Variable("BALANCE_REPLICAS", "replicas", parse.count_or_auto, "a whole number from 1, or auto", "1",
             "modes `balanced` and `auto`: data-parallel replicas to train, each on its own share of the devices; "
             "`auto`: the most that fit. Under a launcher the number of its processes on this machine decides"),
    Variable("BALANCE_PIPELINE", "pipeline", parse.count_or_auto_or_off, "a whole number from 1, auto or off", "off",
             "micro-batches in flight on a device map, so that its devices compute at the same time; `auto`: the "
             "most of an accumulation that fit; `1`: only the transfers between devices change. Not measured on GPUs "
             "yet"),
    Variable("BALANCE_ZERO_CONFIG", "zero_config", parse.zero_config, "the path of a DeepSpeed JSON file, or JSON", "",
             "mode `zero3`: merged over the shim's own DeepSpeed config"),
    Variable("BALANCE_OFFLOAD", "offload", parse.one_of(OFFLOADS), "one of " + ", ".join(OFFLOADS), "none",
             "mode `zero3`: keep optimizer state, or weights too, in host memory"),
    Variable("BALANCE_NPROC", "nproc", parse.count, "a whole number from 1", "one for each device",
             "mode `zero3`: processes to start on this machine; CPU processes if it has no device"),
    Variable("BALANCE_NCCL_TIMEOUT", "nccl_timeout", parse.count, "seconds, a whole number from 1",
             "the script's `ddp_timeout`, else 1800",
             "mode `zero3`: how long ranks wait for each other in a collective operation"),
    Variable("BALANCE_REPORT", "report", parse.report, "text, off, or a folder that can be written", "text",
             "where plan and map go: standard error, nowhere, or also `plan.json` and `device_map.json` in a "
             "folder, with what `balance-shim report` reads"),
    Variable("BALANCE_SIMULATE", "simulate", parse.simulate, "devices such as 4x24GiB, 2x80GiB+2x24GiB or 4xRTX4090",
             "",
             "run on simulated devices, also named as in `2xA100-40GB+2xT4` or `4x20GiB@RTX4090`; `:shapes` at "
             "the end simulates shapes only. With a report folder, `simulation.json` has their peaks"),
    Variable("BALANCE_CACHE", "cache", parse.cache, "a folder, or off", "~/.cache/balance_shim",
             "where profiles and repairs of models are kept"),
    Variable("BALANCE_STRICT", "strict", parse.flag, "1 or 0", "0",
             "an internal failure, or any bad value, stops the program"),
    Variable("BALANCE_LANG", "lang", parse.one_of(LANGUAGES), "one of " + ", ".join(LANGUAGES),
             "zh in a Chinese locale, else en",
             "language of `balance-shim env`, `plan` and out-of-memory advice; the locale is that of `LC_ALL`, "
             "`LC_MESSAGES`, `LANG`, in this order"),
    Variable("BALANCE_LOG_LEVEL", "log_level", parse.one_of(LEVELS), "one of " + ", ".join(LEVELS), "info",
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
        fields["mode"] = "map"  # unless BALANCE_MODE, which is read next, is set
    for variable in VARIABLES:
        text = environ.get(variable.name, "").strip()
        if not text:  # set but empty is how shells and YAML files write "not set"
            continue
        if variable.name == "BALANCE_DEVICE_MAP" and fields["mode"] not in ("map", "auto"):
            continue  # not used, so not read: it may be a file of another machine
        only = MODES_OF.get(variable.name, ())
        if only and fields["mode"] not in only:
            fault = _message("{name} is for BALANCE_MODE={modes} only", name=variable.name, modes=" or ".join(only))
            faults.append((variable.name, fault, "it is ignored", False))
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
                now = _message("using the default ({default})", default=variable.default)
            shown = repr(_shortened(text))
            fault = _message("{name}={text} is not {values}", name=variable.name, text=shown, values=variable.allowed)
            faults.append((variable.name, fault, now, fatal))

    mode = fields["mode"]
    if mode == "map" and not environ.get("BALANCE_DEVICE_MAP", "").strip():
        text = "BALANCE_MODE=map needs BALANCE_DEVICE_MAP, the path of a JSON file or JSON"
        faults.append(("BALANCE_DEVICE_MAP", text, "no model will be loaded", True))
    elif mode in ("balanced", "zero3") and environ.get("BALANCE_DEVICE_MAP", "").strip():
        text = _message("BALANCE_DEVICE_MAP is set but BALANCE_MODE={mode}", mode=mode)
        faults.append(("BALANCE_DEVICE_MAP", text, "the map is not used (BALANCE_MODE=map uses it)", False))

    faults += [(name, fault, "it is ignored", False) for name, fault in misspelled(environ)]
    strict = bool(fields.get("strict", False))
    problems = []
    for name, fault, consequence, fatal in faults:
        consequence = "BALANCE_STRICT stops the program" if strict and not fatal else consequence
        line = _message("{fault}; {consequence}", fault=fault, consequence=consequence)
        problems.append(SettingProblem(name, line, fatal or strict))
    return Settings(**fields), tuple(problems)


def _message(template: str, **fields: str) -> str:
    from .language.message import Message  # only where a value is wrong: arming imports nothing that it can do without

    return Message(template, **fields)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def misspelled(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return a (variable, fault) for each name that looks like one of ours and is not: other programs balance, too."""
    names = [variable.name for variable in VARIABLES]
    lines = []
    for name in sorted(environ):
        if not name.startswith("BALANCE_") or name in names or not environ[name].strip():
            continue
        from difflib import get_close_matches

        near = get_close_matches(name, names, n=1, cutoff=0.85)
        if near:
            lines.append((name, _message("{name} is not a variable (did you mean {near}?)", name=name, near=near[0])))
    return lines
