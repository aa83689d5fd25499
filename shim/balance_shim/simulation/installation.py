"""Putting a simulated machine into torch, whole or not at all."""

import contextlib
import functools
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from .. import state
from ..cache import folder_of
from ..device_spec import SimulationSpec
from ..errors import SimulationError
from ..patching import import_hooks
from ..upstream import fused_head
from . import data_parallel, hiding

if TYPE_CHECKING:
    from ..timing.clock import Clock


class Installation:
    """Everything that has to live as long as the simulated machine."""

    def __init__(self, spec: SimulationSpec):
        """Register the backend and patch torch.

        Raises:
            SimulationError: that is not possible in this process; nothing has been changed then.
        """
        with hiding.restored_on_failure():
            _check()
            self._install(spec)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for internals of a real torch_npu
        _forget_answers()
        import_hooks.watch("transformers.training_args", data_parallel.count_devices_as_on_cuda)
        import_hooks.watch("transformers.trainer", data_parallel.train_one_copy)
        follow_triton = functools.partial(fused_head.follow_triton, values=not spec.shapes_only)
        import_hooks.watch(fused_head.KERNELS, follow_triton)

    def _install(self, spec: SimulationSpec) -> None:
        from ..virtual import attention, dispatch
        from ..virtual.machine import Machine
        from . import autocast, backend, engine, factories, generators, patches, process_group, stand_in, timed
        from .tensor import BACKEND, SimulatedTensor

        with contextlib.ExitStack() as undo:
            torch.utils.rename_privateuse1_backend(BACKEND)  # torch allows the same name again
            self.spec = spec
            self.machine = Machine(
                BACKEND, spec.capacities, SimulatedTensor, spec.shapes_only, architectures=spec.architectures
            )
            self.machine.generators = generators.Generators(len(spec.capacities))
            clock = _clock(spec)
            self.timed = None if clock is None else timed.Timed(clock)
            self.machine.watcher = self.timed
            self.module = backend.make_module(self.machine, spec, clock)
            fused = attention.make_attention(self.machine)
            SimulatedTensor.machine = self.machine
            SimulatedTensor.run = dispatch.Dispatcher(self.machine, fused)

            self.libraries, weights = autocast.register()
            self.libraries.append(factories.register(self.machine))
            self.libraries.append(factories.register_attention(fused))
            for library in self.libraries:
                undo.callback(library._destroy)
            undo.push(patches.apply(self.machine, self.module, weights))
            for name, value in stand_in.make_package(self.module).items():
                sys.modules[name] = value
                undo.callback(sys.modules.pop, name)
            # Last, because there is no way back from it.
            torch.utils.backend_registration._setup_privateuseone_for_python_backend(
                BACKEND, self.module, backend.Hooks(), engine.Guard()
            )
            process_group.register()
            undo.pop_all()
        if self.timed is not None:
            timed.watch_optimizers(self.timed)
            import_hooks.watch("accelerate.hooks", self.timed.count_hooks)


def _clock(spec: SimulationSpec) -> "Clock | None":
    """Return a clock for the devices; None unless the kind of each is known."""
    from ..timing.clock import Clock
    from ..timing.measured import host_of, rates_for

    folder = folder_of(state.settings().cache)
    kinds = map(spec.kind, range(len(spec.capacities)))
    rates = [None if kind is None else rates_for(kind.product, kind, folder) for kind in kinds]
    known_rates = [rate for rate in rates if rate is not None]
    return Clock(known_rates, host_of(known_rates)) if len(known_rates) == len(rates) else None


def _forget_answers() -> None:
    """Have libraries that were there before ask again which accelerators there are."""
    for name in ("transformers.utils.import_utils", "accelerate.utils.imports"):
        for question in vars(sys.modules.get(name, ModuleType(name))).copy().values():
            if hasattr(question, "cache_clear"):
                question.cache_clear()


def _check() -> None:
    """Raise SimulationError if the machine cannot be put into this process."""
    from . import stand_in

    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        raise SimulationError(
            f"torch {torch.__version__} has no backends written in Python, which simulated devices need; "
            "use a newer torch (2.13 is known to work)"
        )
    backend = torch._C._get_privateuse1_backend_name()
    if backend == "privateuseone" and stand_in.is_installed():
        backend = "torch_npu"
    if backend != "privateuseone":
        raise SimulationError(
            f"torch already has an additional backend here ({backend}), and it takes only one; "
            "simulate in an environment without it"
        )
    for kind in ("cuda", "xpu", "mps", "mtia"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            raise SimulationError(
                f"this process has a real accelerator ({kind}) and has used it, which a simulated one would break; "
                f"hide it from the start{' (CUDA_VISIBLE_DEVICES=-1)' if kind == 'cuda' else ''}"
            )
