"""Ranks that run different modules, the usual cause of hangs under ZeRO-3, found and named.

A module's parameters are gathered by all ranks together. A rank that skips the module joins the others in the next
operation instead: both wait until the time-out, or take parts of one module for those of another. What is to be seen
then is an error of NCCL or gloo. Gradients are reduced by all ranks together as well, so a parameter that gets one on
some ranks only does the same to the backward pass. So each rank notes which modules it runs and which parameters get
gradients, and when it gets no further, fails, or has ended a step with other notes than the first rank, the notes are
compared, over a connection of their own.
"""

import atexit
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from ... import log
from ...errors import ZeroError
from ...patching.guard import attempt
from ..launching import refusal_file
from . import differences, flight_record, passes
from .flight_record import FlightRecord

LONGEST_PATIENCE = 60.0  # seconds without progress before the ranks compare notes; nothing is logged if they agree
POLL = 1.0  # seconds
STORE_TIMEOUT = 10.0  # seconds
ANSWER = 5.0  # seconds that the other ranks get to hand in their notes
LAG = (
    2.0  # seconds that the first rank waits for the others at the end of a step, where they wait for each other anyway
)


class DesyncDetector:
    """Has one rank's notes compared with the others' when something is wrong.

    Args:
        notes: the modules that this rank runs.
        subject: the modules and parameters that are noted.
        store: a `torch.distributed.Store` that the ranks share.
        patience: seconds without progress after which the ranks compare notes.
    """

    def __init__(
        self, notes: FlightRecord, subject: passes.Observed, rank: int, size: int, store: Any, patience: float
    ) -> None:
        self.notes, self.rank, self.size, self.store, self.patience = notes, rank, size, store, patience
        self.inside = False  # a training step
        self.running = False  # the model's forward pass, within a step or not
        self.hooks: list[Any] = []  # by which modules and gradients are noted
        self._checksum = passes.Checksum(subject)
        self._unchecked: dict[int, str] = {}  # step -> checksum of this rank, not compared yet
        self._explained = False
        self._answered = b""
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="balance_shim.zero.divergence.desync", daemon=True)
        self._thread.start()
        # A thread that is inside the store when the interpreter goes takes the process down with SIGABRT.
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the thread, and take no more notes; those that there are stay."""
        for hook in self.hooks:
            hook.remove()
        self._over.set()
        self._thread.join(timeout=STORE_TIMEOUT + ANSWER)
        atexit.unregister(self.stop)

    @contextlib.contextmanager
    def watching(self, inputs: Any) -> Iterator[None]:
        """Be around one forward and backward pass.

        Raises:
            ZeroError: it has ended, but the ranks did not run the same modules: the trained weights are wrong.
        """
        self.notes.begin(sorted(map(str, inputs)) if isinstance(inputs, Mapping) else [])
        self.inside = True
        try:
            yield
        except BaseException as error:
            self.notes.fail(error)
            if isinstance(error, RuntimeError | AssertionError):  # what torch.distributed and DeepSpeed raise
                attempt("explaining an error between ranks", self._explain_failure)
            else:
                self._hand_in()
            raise
        finally:
            self.inside = False
        self.notes.end()
        attempt("comparing what the ranks ran", self._compare_ends)

    def begin_forward(self, kwargs: Mapping[str, Any]) -> None:
        """Note that the model's forward pass begins, which outside of a training step is a pass of its own."""
        self.running = True
        if not self.inside:
            self.notes.begin(sorted(name for name, value in kwargs.items() if value is not None), is_step=False)

    def end_forward(self, well: bool) -> None:
        """Note that the model's forward pass has ended; not `well`: with an exception."""
        self.running = False
        if well and not self.inside:
            self.notes.end()

    def _compare_ends(self) -> None:
        """Compare the checksums of a step that has ended well on the first rank, before the optimizer's step.

        Where others do not come in time, that step is compared at the end of the next one.
        """
        step, total = self.notes.step, self._checksum.of(self.notes)
        if self.rank:
            self.store.set(f"end/{self.rank}/{step}", total)
            self.store.delete_key(f"end/{self.rank}/{step - 3}")  # compared: no rank is a whole step ahead of another
            return
        self._unchecked[step] = total
        with contextlib.suppress(RuntimeError):  # if they never come, that will show
            self.store.wait([f"end/{rank}/{step}" for rank in range(1, self.size)], timedelta(seconds=LAG))
        for pending in sorted(self._unchecked):
            keys = [f"end/{rank}/{pending}" for rank in range(1, self.size)]
            if self.store.check(keys):
                self._check(pending, self._unchecked.pop(pending), self.store.multi_get(keys))
        self._unchecked.pop(step - 1, None)

    def _check(self, step: int, own_total: str, totals: list[bytes]) -> None:
        for rank, total in enumerate(totals, start=1):
            if total.decode() != own_total:
                raise ZeroError(
                    self._explanation()
                    or f"ranks 0 and {rank} ran different modules in step {step}; {differences.ADVICE}"
                )

    def _explain_failure(self) -> None:
        """Log the cause of an error of this rank, before the launcher ends all other ranks because of it."""
        if self.rank == 0:
            self._explain()
            return
        self._hand_in()
        self._ask()
        deadline = time.monotonic() + ANSWER + 2 * POLL
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not self.store.check(["explained"]):
                time.sleep(POLL / 4)

    def _look(self) -> None:
        """Be the thread that notices that this rank gets no further, or that another one has asked."""
        position, since = (0, 0), time.monotonic()
        while not self._over.wait(POLL):
            now = (self.notes.number, self.notes.count)
            if now != position or not (self.inside or self.running):
                position, since = now, time.monotonic()
            try:
                requested = self.store.check(["asked"])
                if requested:
                    self._hand_in()
                if self.rank == 0 and (requested or self._is_stuck(since)):
                    self._explain()
                elif self._is_stuck(since):
                    self._ask()
            except RuntimeError:  # the store is gone: the run is over
                return

    def _is_stuck(self, since: float) -> bool:
        return (self.inside or self.running) and time.monotonic() - since > self.patience

    def _ask(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set("asked", "1")

    def _hand_in(self) -> None:
        text = json.dumps(self.notes.as_dict()).encode()
        if text != self._answered:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"notes/{self.rank}", text)
                self._answered = text

    def _explain(self) -> None:
        with self._lock:  # the training and the thread may both come here
            if self._explained:
                return
            explanation = self._explanation()
            if not explanation:
                with contextlib.suppress(RuntimeError):
                    self.store.delete_key("asked")
            else:
                self._explained = True
                log.error(explanation)
                attempt("telling the launcher that it is explained", self._tell_launcher)
                with contextlib.suppress(RuntimeError):
                    self.store.set("explained", "1")

    def _explanation(self) -> str | None:
        """Return the difference between the ranks' notes, once all have handed them in; None where they agree."""
        self._ask()
        self._hand_in()
        deadline = time.monotonic() + ANSWER
        notes: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(RuntimeError):
            while len(notes) < self.size and time.monotonic() < deadline and not self._over.is_set():
                for rank in range(self.size):
                    if rank not in notes and self.store.check([f"notes/{rank}"]):
                        rank_notes = json.loads(self.store.get(f"notes/{rank}"))
                        if rank_notes["number"] >= self.notes.number or rank_notes["failed"]:
                            notes[rank] = rank_notes
                time.sleep(POLL / 10)
        return differences.difference(notes, self.notes.names, self.notes.parameters)

    def _tell_launcher(self) -> None:
        folder = os.environ.get(refusal_file.FOLDER)
        if folder:
            Path(folder, flight_record.EXPLAINED).touch()


def start(engine: Any, timeout: float) -> DesyncDetector:
    """Return a watch on the modules of the model of DeepSpeed's `engine`, in the place of the one before.

    Args:
        timeout: seconds after which collective operations fail.
    """
    import torch.distributed as dist

    global _current
    if _current is not None:  # it writes to the same files
        _current.stop()
    model = engine.module
    subject = passes.noted(model, int(getattr(engine.optimizer, "reduce_bucket_size", 0) or 5e8))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A connection of its own: the thread must not wait for a lock that a collective operation holds.
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_TIMEOUT))
    named = dist.PrefixStore(
        f"balance_shim/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_starts()}", store
    )
    rank = dist.get_rank()
    record = FlightRecord(
        list(subject.modules), passes.reached_in_backward(subject), rank, os.environ.get(refusal_file.FOLDER)
    )
    watch = DesyncDetector(record, subject, rank, dist.get_world_size(), named, min(LONGEST_PATIENCE, timeout / 3))
    watch.hooks = [*passes.note(record, subject), passes.BackwardHook(record, subject, engine.optimizer)]
    # Ahead of those of the model itself, which belong to the pass.
    # Functions, not methods, which a script that copies its model would copy with the whole watch.
    watch.hooks += [
        model.register_forward_pre_hook(
            lambda _, __, kwargs: watch.begin_forward(kwargs), with_kwargs=True, prepend=True
        ),
        model.register_forward_hook(lambda _, __, output: watch.end_forward(output is not None), always_call=True),
    ]
    _current = watch
    return watch


_count = 0
_current: DesyncDetector | None = None


def _starts() -> int:
    """Return the number of this watch, the same on all ranks: a program may train more than once."""
    global _count
    _count += 1
    return _count
