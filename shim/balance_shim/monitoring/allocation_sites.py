"""Track the lines that allocate tensors, for one step after an alarm, because tracking slows the step down."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .. import log
from .leak_search import LIBRARIES

if TYPE_CHECKING:
    from torch import nn


class Makers:
    """Notes the module that makes each tensor, and has autograd note the line, from `start` to `stop`."""

    def __init__(self, model: "nn.Module") -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._made: dict[int, str] = {}  # storage -> name of the module
        self._hook: Any = None
        self._anomaly = False

    def start(self) -> None:
        import torch

        self._hook = torch.nn.modules.module.register_module_forward_hook(self._note)
        if not torch.is_anomaly_enabled():  # it keeps the stack of each operation; looking for NaN is not wanted
            self._anomaly = True
            torch.autograd.set_detect_anomaly(True, check_nan=False)

    def stop(self) -> None:
        import torch

        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._anomaly:
            self._anomaly = False
            torch.autograd.set_detect_anomaly(False)

    def of(self, tensors: Iterable[Any]) -> str:
        """Return where one of `tensors` was made, the latest first, in words; "" if none was seen being made."""
        for tensor in reversed(list(tensors)):
            line = _line(tensor.grad_fn)
            storage = _storage(tensor)
            module = None if storage is None else self._made.get(storage)
            origin = [f"by {module or 'the model'}"] if module is not None else []
            origin += [f"at {line}"] if line else []
            if origin:
                return f"made {', '.join(origin)}"
        return ""

    def _note(self, module: Any, _: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        try:  # a hook of every module: what fails in here would stop the user's step
            self._note_output(name, output)
        except Exception as error:
            log.once("debug", f"what {name or 'the model'} made is not noted ({type(error).__name__}: {error})")

    def _note_output(self, name: str, output: Any) -> None:
        for tensor in _tensors_in(output):
            key = _storage(tensor)
            if key is None:
                continue
            inner = self._made.get(key)
            # A module that only hands on what one inside of it made is not its maker.
            if inner is None or not (inner.startswith(f"{name}.") or not name):
                self._made[key] = name


def _tensors_in(output: Any) -> Iterator[Any]:
    import torch

    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for item in output.values():
            yield from _tensors_in(item)
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors_in(item)


def _storage(tensor: Any) -> int | None:
    """Return a key of the memory of a tensor; None for one that has none (nested, sparse, some wrappers)."""
    import torch

    try:
        with torch._C.DisableTorchFunctionSubclass():  # deferred logits would be computed for the question
            return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


def _line(grad_fn: Any) -> str:
    """Return "train.py:31 in compute_loss" from the stack that autograd kept: the innermost line of the user's own."""
    stack = getattr(grad_fn, "metadata", {}).get("traceback_", []) if grad_fn is not None else []
    for entry in reversed(stack):
        place = entry.strip().splitlines()[0]  # File "train.py", line 31, in compute_loss
        path, _, rest = place.removeprefix('File "').partition('", line ')
        number, _, function = rest.partition(", in ")
        parts = path.replace("\\", "/").split("/")
        if "site-packages" not in parts and not set(parts) & set(LIBRARIES) and number.isdigit():
            return f"{parts[-1]}:{number} in {function}"
    return ""
