"""The chain that is cut: blocks joined to links, and groups of links that may sit apart from their neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..memory.blocks import Block, anchors
from ..memory.cost import BlockCost
from ..memory.peak import Schedule, merged
from .costed_model import CostedModel


@dataclass(frozen=True)
class Link:
    """A member of the chain: blocks that go together, with their cost."""

    blocks: tuple[Block, ...]
    cost: BlockCost

    @property
    def role(self) -> str:
        return self.blocks[0].role

    def holds(self, names: frozenset[str]) -> bool:
        """Return whether one of `names`, of tensors or blocks, is in here."""
        return any(block.name in names or not names.isdisjoint(block.tensors) for block in self.blocks)


@dataclass(frozen=True)
class EndGroup:
    """Links that share a device, which may be any device: an embedding, a tower, a head; ends that are tied.

    Attributes:
        ahead: those that run before the layers.
        behind: those that run after them.
        pinned: whether the device has to be the first one.
        device: index of the device that it has to be, if it is not `pinned`; None: any.
        must_leave: whether the group cannot stand in the chain, because it has a part at both ends or is bound to a
            device.
    """

    ahead: tuple[Link, ...] = ()
    behind: tuple[Link, ...] = ()
    pinned: bool = False
    device: int | None = None

    @property
    def must_leave(self) -> bool:
        return self.pinned or self.device is not None or bool(self.ahead and self.behind)


@dataclass(frozen=True)
class Chain:
    """A model as the solver takes it: links in forward order, of which the groups' may be taken out of the row."""

    links: tuple[Link, ...]
    groups: tuple[EndGroup, ...]
    schedule: Schedule

    def without(self, groups: Sequence[EndGroup]) -> tuple[Link, ...]:
        """Return the links that are left in the row when `groups` are placed apart."""
        apart = {id(link) for group in groups for link in (*group.ahead, *group.behind)}
        return tuple(link for link in self.links if id(link) not in apart)

    def merged(self, links: Sequence[Link]) -> BlockCost:
        return merged((link.cost for link in links), self.schedule)


def chain_of(costed: CostedModel, whole_tower: bool) -> Chain:
    """Return the chain of `costed`, in which a vision or audio tower is one link if `whole_tower`."""
    links = _followed(costed)
    if whole_tower:
        links = _with_whole_tower(links, costed.schedule)
    links = _joined_by_constraints(links, costed)
    return Chain(tuple(links), tuple(_groups(links, costed)), costed.schedule)


def _followed(costed: CostedModel) -> list[Link]:
    """Return a link for each block, with those that follow it: rotary embeddings, single tensors.

    They are in the order in which a trace saw them run. An embedding, which the library registers behind the tower of a
    vision-language model, runs ahead of it.
    """
    members: dict[int, list[int]] = {}
    for position, lead in enumerate(anchors(costed.blocks)):
        members.setdefault(lead, []).append(position)
    return [
        Link(
            tuple(costed.blocks[position] for position in [lead, *(other for other in members[lead] if other != lead)]),
            merged((costed.costs[position] for position in members[lead]), costed.schedule),
        )
        for lead in sorted(members, key=lambda lead: (costed.costs[lead].rank, lead))
    ]


def _with_whole_tower(links: list[Link], schedule: Schedule) -> list[Link]:
    tower = [position for position, link in enumerate(links) if link.role == "tower"]
    if not tower or tower != list(range(tower[0], tower[-1] + 1)):
        return links
    joined_tower = _joined([links[position] for position in tower], schedule)
    return [*links[: tower[0]], joined_tower, *links[tower[-1] + 1 :]]


def _joined_by_constraints(links: list[Link], costed: CostedModel) -> list[Link]:
    """Join links that share a tensor or are colocated, unless they are the two ends, which are a group.

    Rare (an encoder and decoder that share their embedding): the whole stretch cannot be one block, so all holders go
    where the first one is and the chain crosses over and back.
    """
    for group in (*costed.structure.ties, *costed.constraints.groups):
        holders = [position for position, link in enumerate(links) if link.holds(group)]
        if len(holders) > 1 and not _are_ends(links, holders):
            together = _joined([links[position] for position in holders], costed.schedule)
            links = [
                together if position == holders[0] else link
                for position, link in enumerate(links)
                if position not in holders[1:]
            ]
    return links


def _are_ends(links: Sequence[Link], holders: Sequence[int]) -> bool:
    """Whether two holders are the embedding, ahead of all layers, and something behind them."""
    layers = [position for position, link in enumerate(links) if link.role == "layer"]
    if len(holders) != 2 or not layers or links[holders[0]].role != "embedding":
        return False
    return holders[0] < layers[0] and holders[1] > layers[-1]


def _groups(links: Sequence[Link], costed: CostedModel) -> list[EndGroup]:
    """Return the groups of `links`; those that have to be on the first device are in pinned ones.

    The head's group is bound to the device of the head that it is compared with, unless it is pinned.
    """
    on_first = {id(link) for link in links if link.holds(costed.constraints.on_first)}
    groups = [
        replace(
            group,
            pinned=any(id(link) in on_first for link in (*group.ahead, *group.behind)),
            device=costed.head_device if _has_head(group) else None,
        )
        for group in _free_groups(links, costed)
    ]
    grouped = {id(link) for group in groups for link in (*group.ahead, *group.behind)}
    ungrouped = tuple(link for link in links if id(link) in on_first - grouped)
    return [*groups, EndGroup(ungrouped, pinned=True)] if ungrouped else groups


def _has_head(group: EndGroup) -> bool:
    return any(block.role == "head" for link in (*group.ahead, *group.behind) for block in link.blocks)


def _free_groups(links: Sequence[Link], costed: CostedModel) -> list[EndGroup]:
    layers = [position for position, link in enumerate(links) if link.role == "layer"]
    if not layers:
        return []
    front = links[: layers[0]]
    embedding = tuple(link for link in front if link.role == "embedding")
    tower = tuple(link for link in front if link.role == "tower" and len(link.blocks) > 1)
    # Behind the last layer come norm, pooler, head, classifier: all that makes the logits.
    head = tuple(links[layers[-1] + 1 :])
    tied = any(
        any(link.holds(constraint) for link in embedding) and any(link.holds(constraint) for link in head)
        for constraint in (*costed.structure.ties, *costed.constraints.groups)
    )
    ends = [EndGroup(embedding, head)] if tied else [EndGroup(ahead=embedding), EndGroup(behind=head)]
    return [group for group in (*ends, EndGroup(ahead=tower)) if group.ahead or group.behind]


def _joined(links: Sequence[Link], schedule: Schedule) -> Link:
    return Link(
        tuple(block for link in links for block in link.blocks), merged((link.cost for link in links), schedule)
    )
