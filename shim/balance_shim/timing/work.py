"""What a model computes and copies in a micro-batch, block by block: counted once, timed on any device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from .rates import DeviceRates, HostRates, Operation

INPUTS = ""  # in place of a block's name: the device where inputs arrive
PREVIOUS = "<previous>"  # the block ahead in the chain, whichever it is


@dataclass(frozen=True)
class Pass:
    """The operations of one block in one pass, equal ones counted together.

    Attributes:
        operations: (operation, how many of it).
    """

    operations: tuple[tuple[Operation, int], ...] = ()

    def seconds(self, rates: DeviceRates) -> float:
        """Return how long a device computes."""
        return _seconds(self, rates)

    def launching(self, host: HostRates) -> float:
        """Return how long the host takes to queue everything."""
        return _launching(self, host)

    @property
    def recomputes(self) -> bool:
        """Whether a checkpointed layer runs again."""
        return any(operation.caller == "recomputing" for operation, _ in self.operations)

    @property
    def flops(self) -> int:
        return sum(count * operation.flops for operation, count in self.operations)


@lru_cache(maxsize=4096)
def _seconds(work: Pass, rates: DeviceRates) -> float:
    return sum(count * rates.seconds(operation) for operation, count in work.operations if operation.launches)


@lru_cache(maxsize=4096)
def _launching(work: Pass, host: HostRates) -> float:
    return sum(count * host.seconds(operation) for operation, count in work.operations)


@dataclass(frozen=True)
class Transfer:
    """What a block takes from another one, where that is on another device; copies and their bytes in total.

    Attributes:
        source: name of the block that has it, `INPUTS` or `PREVIOUS`.
        forward: in the forward pass, to the block.
        again: the same in the backward pass, where a layer is recomputed.
        returned: from the block, in the backward pass: gradients.
    """

    source: str
    forward: tuple[int, int] = (0, 0)
    again: tuple[int, int] = (0, 0)
    returned: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class BlockWork:
    """What one block computes in a micro-batch.

    Attributes:
        forward, backward: operations; recomputed ones are of the backward pass.
        transfers: what it takes from other blocks.
    """

    forward: Pass = Pass()
    backward: Pass = Pass()
    transfers: tuple[Transfer, ...] = ()

    def renamed(self, name_of: Callable[[str], str]) -> "BlockWork":
        """Return the work with `name_of` applied to the names of blocks."""
        return replace(
            self,
            transfers=tuple(
                transfer
                if transfer.source in (INPUTS, PREVIOUS)
                else replace(transfer, source=name_of(transfer.source))
                for transfer in self.transfers
            ),
        )


@dataclass(frozen=True)
class ModelWork:
    """The work of a model.

    Attributes:
        blocks: in the order of the blocks; None for one that was not traced. Empty where nothing was.
        first: what is computed where inputs arrive, in no block; None without a trace.
    """

    blocks: tuple[BlockWork | None, ...] = ()
    first: BlockWork | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all of the model was traced."""
        return self.first is not None and bool(self.blocks) and None not in self.blocks

    def to_json(self) -> dict[str, Any]:
        """Return JSON with each distinct block once: most layers are alike."""
        every = [self.first, *self.blocks]
        distinct = list(dict.fromkeys(block for block in every if block is not None))
        numbers = {block: number for number, block in enumerate(distinct)}
        return {
            "distinct": [asdict(block) for block in distinct],
            "numbers": [None if block is None else numbers[block] for block in every],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelWork":
        """Return the work that `to_json` has been called on."""
        distinct = [_block(fields) for fields in content["distinct"]]
        first, *blocks = (None if number is None else distinct[number] for number in content["numbers"])
        return cls(tuple(blocks), first)


NO_WORK = ModelWork()  # of a model that was not traced


def _block(fields: Mapping[str, Any]) -> BlockWork:
    return BlockWork(
        _pass(fields["forward"]["operations"]),
        _pass(fields["backward"]["operations"]),
        tuple(
            Transfer(entry["source"], *(tuple(entry[name]) for name in ("forward", "again", "returned")))
            for entry in fields["transfers"]
        ),
    )


def _pass(operations: Sequence[Any]) -> Pass:
    return Pass(tuple((Operation(*operation), count) for operation, count in operations))
