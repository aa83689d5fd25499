"""Ranks that run different modules, the usual cause of hangs under ZeRO-3, found and named.

A module's parameters are gathered by all ranks together. A rank that skips the module joins the others in the next
operation instead: both wait until the time-out, or take parts of one module for those of another. What is to be seen
then is an error of NCCL or gloo. So each rank notes which modules it runs, and when it gets no further, fails, or has
ended a step with other notes than the first rank, the notes are compared, over a connection of their own.
"""

import atexit
import contextlib
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from .. import log
from ..errors import BalanceError
from ..seams.guard import attempt
from . import notes
from .notes import Notes

LONGEST_PATIENCE = 60.0  # seconds without progress before the ranks compare notes; nothing is said if they agree
POLL = 1.0  # seconds
STORE_TIMEOUT = 10.0  # seconds
ANSWER = 5.0  # seconds that the other ranks get to hand in their notes


class Watch:
    """Has one rank's notes compared with the others' when something is wrong.

    Args:
        notes: what this rank runs.
        store: a `torch.distributed.Store` that the ranks share.
        patience: seconds without progress after which the ranks compare notes.
    """

    def __init__(self, notes: Notes, rank: int, size: int, store: Any, patience: float) -> None:
        self.notes, self.rank, self.size, self.store, self.patience = notes, rank, size, store, patience
        self.inside = False
        self.hooks: list[Any] = []  # by which modules are noted
        self._explained = False
        self._answered = b""
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="balance_shim.zero.watch", daemon=True)
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
            BalanceError: it has ended, but the ranks did not run the same modules: what they have learned is wrong.
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
        attempt("comparing what the ranks ran", self._compare_ends)

    def _compare_ends(self) -> None:
        """Compare the checksums of a step that has ended well, on the first rank, which is one exchange for each."""
        total = f"{self.notes.step}:{zlib.crc32(repr(self.notes.order).encode())}"
        if self.rank:
            self.store.set(f"end/{self.rank}/{self.notes.step % 2}", total)
            return
        keys = [f"end/{rank}/{self.notes.step % 2}" for rank in range(1, self.size)]
        if not self.store.check(keys):
            return  # they are not as far yet; if they never are, that will show
        other = [rank for rank, key in enumerate(keys, start=1) if self._differs(self.store.get(key), total)]
        if other:
            found = self._explanation()
            raise BalanceError(
                found or f"ranks 0 and {other[0]} ran different modules in step {self.notes.step}; {notes.ADVICE}"
            )

    def _differs(self, theirs: bytes, ours: str) -> bool:
        step, _, _ = theirs.decode().partition(":")
        return step == str(self.notes.step) and theirs.decode() != ours

    def _explain_failure(self) -> None:
        """Say what is behind an error of this rank, before the launcher ends all others because of it."""
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
        seen, since = (0, 0), time.monotonic()
        while not self._over.wait(POLL):
            now = (self.notes.step, self.notes.count)
            if now != seen or not self.inside:
                seen, since = now, time.monotonic()
            try:
                asked = self.store.check(["asked"])
                if asked:
                    self._hand_in()
                if self.rank == 0 and (asked or self._is_stuck(since)):
                    self._explain()
                elif self._is_stuck(since):
                    self._ask()
            except RuntimeError:  # the store is gone: the run is over
                return

    def _is_stuck(self, since: float) -> bool:
        return self.inside and time.monotonic() - since > self.patience

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
            found = self._explanation()
            if not found:
                with contextlib.suppress(RuntimeError):
                    self.store.delete_key("asked")
            else:
                self._explained = True
                log.error(found)
                with contextlib.suppress(RuntimeError):
                    self.store.set("explained", "1")

    def _explanation(self) -> str | None:
        """Return what distinguishes the ranks' notes, once all have handed them in; None where they agree."""
        self._ask()
        self._hand_in()
        deadline = time.monotonic() + ANSWER
        found: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(RuntimeError):
            while len(found) < self.size and time.monotonic() < deadline and not self._over.is_set():
                for rank in range(self.size):
                    if rank not in found and self.store.check([f"notes/{rank}"]):
                        theirs = json.loads(self.store.get(f"notes/{rank}"))
                        if theirs["step"] >= self.notes.step or theirs["failed"]:
                            found[rank] = theirs
                time.sleep(POLL / 10)
        return notes.difference(found, self.notes.names)


def start(model: Any, timeout: float) -> Watch:
    """Return a watch on the modules of `model`, whose parameters DeepSpeed has divided already.

    Args:
        timeout: seconds after which collective operations fail.
    """
    import torch.distributed as dist

    gathered = gathered_modules(model)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A connection of its own: the thread must not wait for a lock that a collective operation holds.
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_TIMEOUT))
    named = dist.PrefixStore(
        f"balance_shim/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_starts()}", store
    )
    rank = dist.get_rank()
    ours = Notes(list(gathered), rank, os.environ.get(notes.FOLDER))
    watch = Watch(ours, rank, dist.get_world_size(), named, min(LONGEST_PATIENCE, timeout / 3))
    watch.hooks = [
        module.register_forward_pre_hook(lambda *_, index=index: ours.add(index))
        for index, module in enumerate(gathered.values())
    ]
    return watch


def gathered_modules(model: Any) -> dict[str, Any]:
    """Return by name the modules that make all ranks gather parameters when they run.

    Small parameters stay whole on every rank (`ds_persist`), and leaf modules gather for those inside of them.
    """
    found: dict[str, Any] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        leaf = getattr(module, "_z3_leaf", False)
        if leaf:
            inside = (*inside, f"{name}.")
        parameters = module.parameters(recurse=bool(leaf))
        if any(hasattr(each, "ds_id") and not getattr(each, "ds_persist", False) for each in parameters):
            found[name] = module
    return found


_count = 0


def _starts() -> int:
    """Return the number of this watch, the same on all ranks: a program may train more than once."""
    global _count
    _count += 1
    return _count
