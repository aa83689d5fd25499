"""Moves the blocks of a model that has been dispatched to where another device map wants them, in place.

Nothing is made anew that others may hold: parameters, buffers and gradients stay the objects that they were, and so do
accelerate's hooks and the dict `hf_device_map`. Either everything moves or, if something fails on the way, everything
is where it was.
"""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import LostModelError, MoveError
from ..map_file import DeviceMap
from ..units import format_size
from . import align_hooks, movable_pieces
from .movable_pieces import Piece

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Moved", "move"]

GRANULE = 512  # bytes; CUDA's allocator rounds requests up to it
UNKNOWN = 1 << 62  # free bytes of a device that does not report them


@dataclass(frozen=True)
class Moved:
    """The result of `move`.

    Attributes:
        blocks: the keys of the new map that had something to move, in the model's order.
        tensors: how many tensors were copied to another device; tied ones once.
        size: their bytes.
        over_host: how many of them waited in host memory because no order of moves had room for each.
    """

    blocks: tuple[str, ...] = ()
    tensors: int = 0
    size: int = 0
    over_host: int = 0


def move(model: "nn.Module", device_map: DeviceMap, optimizers: "Iterable[torch.optim.Optimizer]" = ()) -> Moved:
    """Bring every parameter and buffer of `model` to its device in `device_map`, and accelerate's hooks with them.

    To be called between steps: a graph that still waits for its backward pass would not survive it.

    Args:
        model: the model that was dispatched, not a wrapper around it (PEFT's adapters inside of it move along).
        device_map: names of modules or tensors -> device index, for all of the model. Devices of parameters that PEFT
            has put away under `base_layer` are those of the names that they had.
        optimizers: those whose state for these parameters moves along. One that has made no step has none.

    Raises:
        MoveError: the map does not fit the model or the machine, the model holds something that cannot be moved in
            place, or moving failed; the old map is then in force as before.
        LostModelError: moving failed, and so did moving back.
    """
    import torch

    device_map = dict(device_map)  # the caller's may be the very dict that is changed below
    places = movable_pieces.Places(model, device_map)
    movable_pieces.refuse_unmovable(model)
    pieces = movable_pieces.to_move(model, places, optimizers)
    if not pieces and getattr(model, "hf_device_map", None) == device_map:
        return Moved()
    _check_room(pieces)
    with _all_or_nothing(pieces) as undo, torch.no_grad():
        # Undone last, when the tensors are back: the addresses in it are theirs.
        undo.callback(align_hooks.renew_tied_addresses, model)
        over_host = _transfer(pieces, undo)
        align_hooks.align(model, places, undo)
        _note_map(model, device_map, undo)
        align_hooks.renew_tied_addresses(model)
    blocks = tuple(dict.fromkeys(piece.block for piece in pieces))
    return Moved(blocks, len(pieces), sum(piece.size for piece in pieces), over_host)


@contextmanager
def _all_or_nothing(pieces: list[Piece]) -> Iterator[ExitStack]:
    """If the body raises, undo the registered moves, last first: every state on the way back has had room before."""
    undo = ExitStack()
    try:
        yield undo
    except BaseException as error:
        # Copies that were half-way are held by the frames of the error, and would take the room needed to go back.
        traceback.clear_frames(error.__traceback__)
        _empty_caches()
        try:
            undo.close()
        except Exception as second:
            raise LostModelError(
                f"moving blocks failed ({_first_line(error)}), and so did moving them back ({_first_line(second)}): "
                "the model cannot be used any more; load it again"
            ) from error
        if not isinstance(error, Exception):  # a Ctrl-C stays one
            raise
        raise MoveError(f"moving blocks failed, the map stays as it was: {_first_line(error)}") from error
    finally:
        if pieces:
            _empty_caches()


def _transfer(pieces: list[Piece], undo: ExitStack) -> int:
    """Copy each piece to its device when there is room for it; return how many had to wait on the host.

    One piece at a time, whose old memory is free again at once, and first those that leave their device with no more
    than it holds before or after: so none ever holds more than one tensor above that. Two full devices that exchange
    something are helped by the host.
    """
    import torch

    host = torch.device("cpu")
    waiting, over_host = list(pieces), 0
    unfilled = {device: max(0, more) for device, more in _arriving(pieces).items()}  # of the most that it holds
    while waiting:
        free = {device: _free_bytes(device) for device in unfilled}

        def bring(piece: Piece, rooms: tuple[dict[torch.device, int], ...] = (unfilled, free)) -> None:
            source = piece.device
            _put(piece, piece.goal, undo)
            for room in rooms:
                room[piece.goal] -= _rounded(piece.size)
                if source in room:
                    room[source] += _rounded(piece.size)

        stuck = []
        for piece in waiting:
            if _rounded(piece.size) > min(unfilled[piece.goal], free[piece.goal]):
                stuck.append(piece)
            else:
                bring(piece)
        if len(stuck) == len(waiting):
            fitting = [piece for piece in stuck if _rounded(piece.size) <= free[piece.goal]]
            goals = {piece.goal for piece in stuck}
            helpful = [piece for piece in stuck if piece.device in goals]
            if fitting:
                chosen = min(fitting, key=lambda piece: piece.size)
                bring(chosen)
            elif helpful:
                chosen = max(helpful, key=lambda piece: piece.size)
                unfilled[chosen.device] += _rounded(chosen.size)
                _put(chosen, host, undo)
                over_host += 1
                continue
            else:  # nothing that we could take away would help; the allocator knows best whether it fits
                chosen = stuck[0]
                bring(chosen)
            stuck = [piece for piece in stuck if piece is not chosen]
        waiting = stuck
    return over_host


def _arriving(pieces: list[Piece]) -> "dict[torch.device, int]":
    """Return the bytes that each goal of `pieces` gets, less those that leave it."""
    arriving: dict[torch.device, int] = {}
    for piece in pieces:
        arriving[piece.goal] = arriving.get(piece.goal, 0) + _rounded(piece.size)
    for piece in pieces:
        if piece.device in arriving:
            arriving[piece.device] -= _rounded(piece.size)
    return arriving


def _put(piece: Piece, device: "torch.device", undo: ExitStack) -> None:
    # Registered first: a piece of several tensors may fail between two of them.
    undo.callback(piece.put, piece.device)
    piece.put(device)


def _check_room(pieces: list[Piece]) -> None:
    """Raise if a device lacks room for its final contents, before anything is touched."""
    for device, more in sorted(_arriving(pieces).items(), key=lambda item: str(item[0])):
        missing = more - _free_bytes(device)
        if missing > 0:
            raise MoveError(
                f"moving blocks would need {format_size(missing)} more than {device} has free; the map stays as it was"
            )


def _note_map(model: "nn.Module", device_map: DeviceMap, undo: ExitStack) -> None:
    held: Any = getattr(model, "hf_device_map", None)
    if isinstance(held, dict):
        undo.callback(held.update, dict(held))
        undo.callback(held.clear)
        held.clear()
        held.update(device_map)
    else:  # transformers 5 notes no map of one device
        undo.callback(delattr, model, "hf_device_map")
        model.hf_device_map = device_map  # type: ignore[assignment]


def _free_bytes(device: "torch.device") -> int:
    """Return the bytes that can be allocated on `device`, including those cached by this process's allocator."""
    import torch

    module: Any = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return UNKNOWN
    try:
        free = module.mem_get_info(device.index)[0]
    except Exception:  # full for its driver; whether something of ours has room, the allocator knows
        return UNKNOWN
    if hasattr(module, "memory_reserved") and hasattr(module, "memory_allocated"):
        free += max(0, module.memory_reserved(device.index) - module.memory_allocated(device.index))
    return int(free)


def _empty_caches() -> None:
    """Give freed memory back to the devices, as far as whole segments of the allocator are free.

    Weights that transformers has loaded are parts of one block a device (`caching_allocator_warmup`): what leaves it
    stays reserved, free for tensors of this process and for nobody else.
    """
    import torch

    from .. import devices

    kind = devices.accelerator_type()
    module: Any = None if kind is None else torch.get_device_module(kind)
    if hasattr(module, "empty_cache"):
        module.empty_cache()


def _rounded(size: int) -> int:
    return -(-size // GRANULE) * GRANULE


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
