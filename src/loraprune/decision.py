"""Decision: which groups go, in which order; a value, not an action.

Reads    sensitivities averaged over time, (L, G) for every kind, the present mask, a budget in parameters
Gives    the groups to remove now, and what ended the list
Source   -
Symbols  slice = one group of a kind in every layer, each layer's best remaining one; S = dual score
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loraprune.records import KINDS, Decision, Group, GroupKind, Mask, ModelGroups, Removal
from loraprune.sensitivity import dual_score, share_of

Scores = Mapping[GroupKind, Tensor]
Widths = Literal["uniform", "per_layer"]


@dataclass(frozen=True)
class Rules:
    """What every decision obeys."""

    threshold: float = 0.5
    epsilon: float = 1e-6
    minimum_forget: float = 0.1
    min_groups_per_layer: int = 1
    widths: Widths = "uniform"


@dataclass(frozen=True)
class _Unit:
    """What goes at once: a slice under uniform widths, one group under per-layer widths."""

    kind: GroupKind
    groups: tuple[Group, ...]
    parameters: int
    share: float | None
    forget: float | None
    retain: float
    candidate: bool


def decide_unlearning(
    forget: Scores, retain: Scores, kept: Mask, groups: ModelGroups, *, budget: int, rules: Rules, step: int = 0
) -> Decision:
    """Return the groups that go now: candidates in falling order of share, while they fit into `budget` parameters.

    Under uniform widths a candidate is a slice, its share made of summed sensitivities.
    """
    queues = [
        queue
        for kind in KINDS
        for queue in _queues(
            kind, _unlearning_order(forget[kind], retain[kind], kept.kept[kind], rules), kept, groups, rules
        )
    ]

    def judged(kind: GroupKind, members: tuple[Group, ...]) -> _Unit:
        return _judged_unit(kind, members, forget[kind], retain[kind], groups, rules)

    return _take(queues, judged, lambda unit: -(unit.share or 0.0), kept, groups, budget, step)


def decide_compression(
    retain: Scores, kept: Mask, groups: ModelGroups, *, budget: int, rules: Rules, step: int = 0
) -> Decision:
    """Return the groups of lowest sensitivity, as nearly as possible the same fraction of each kind, worth `budget`."""
    queues = []
    for kind in KINDS:
        order = torch.where(kept.kept[kind], retain[kind], torch.inf).sort(dim=1, stable=True).indices
        queues += _queues(kind, order, kept, groups, rules)

    def plain(kind: GroupKind, members: tuple[Group, ...]) -> _Unit:
        total = sum(float(retain[kind][one.layer, one.index]) for one in members)
        return _Unit(kind, members, _parameters(kind, members, groups), None, None, total / len(members), True)

    gone = {kind: int((~one).sum()) for kind, one in kept.kept.items()}

    def fraction_gone(unit: _Unit) -> float:
        return (gone[unit.kind] + len(unit.groups)) / kept.kept[unit.kind].numel()

    def count(unit: _Unit) -> None:
        gone[unit.kind] += len(unit.groups)

    return _take(queues, plain, fraction_gone, kept, groups, budget, step, taken=count)


def _unlearning_order(forget: Tensor, retain: Tensor, kept: Tensor, rules: Rules) -> Tensor:
    """Return each layer's groups, (L, G), best first: by share; dead ones later, removed ones last."""
    score = dual_score(forget, retain, rules.epsilon)
    score = torch.where(forget >= rules.minimum_forget, score, score / (1.0 + score) - 1.0)
    return torch.where(kept, score, -torch.inf).sort(dim=1, descending=True, stable=True).indices


def _queues(
    kind: GroupKind, order: Tensor, kept: Mask, groups: ModelGroups, rules: Rules
) -> list[Iterator[tuple[GroupKind, tuple[Group, ...]]]]:
    """Return the units of one kind, best first: one queue of slices, or a queue of single groups a layer."""
    left = kept.kept[kind].sum(1)
    spare = (left - rules.min_groups_per_layer).clamp(min=0).tolist()
    units: list[list[tuple[GroupKind, tuple[Group, ...]]]]
    if rules.widths == "uniform":
        columns = [tuple(Group(layer, kind, int(i)) for layer, i in enumerate(order[:, j])) for j in range(min(spare))]
        units = [[(kind, members) for members in columns]]
    else:
        units = [
            [(kind, (Group(layer, kind, int(i)),)) for i in order[layer, : spare[layer]]] for layer in range(len(order))
        ]
    return [iter(one) for one in units]


def _judged_unit(
    kind: GroupKind, members: tuple[Group, ...], forget: Tensor, retain: Tensor, groups: ModelGroups, rules: Rules
) -> _Unit:
    layers, indices = [one.layer for one in members], [one.index for one in members]
    cared, kept = float(forget[layers, indices].mean()), float(retain[layers, indices].mean())
    share = share_of(dual_score(cared, kept, rules.epsilon))
    candidate = share > rules.threshold and cared >= rules.minimum_forget
    return _Unit(kind, members, _parameters(kind, members, groups), share, cared, kept, candidate)


def _parameters(kind: GroupKind, members: tuple[Group, ...], groups: ModelGroups) -> int:
    return sum(groups.layers[kind][one.layer].parameters_per_group for one in members)


def _take(
    queues: list[Iterator[tuple[GroupKind, tuple[Group, ...]]]],
    make: Callable[[GroupKind, tuple[Group, ...]], _Unit],
    order: Callable[[_Unit], float],
    kept: Mask,
    groups: ModelGroups,
    budget: int,
    step: int,
    taken: Callable[[_Unit], None] | None = None,
) -> Decision:
    """Take units from the heads of the queues, lowest `order` first, until nothing fits or nothing is a candidate."""
    heads = [(queue, unit) for queue in queues if (unit := _next(queue, make)) is not None]
    removals: list[Removal] = []
    left_kv = int(kept.kept["kv_group"][0].sum())
    refused_for_size = False
    while heads:
        heads.sort(key=lambda head: (order(head[1]), head[1].kind, head[1].groups[0]))
        queue, unit = heads.pop(0)
        if not unit.candidate:
            continue
        if unit.parameters > budget or not _allowed(unit, left_kv, groups):
            refused_for_size = True
            continue
        budget -= unit.parameters
        left_kv -= unit.kind == "kv_group"
        removals += [Removal(one, unit.share, unit.forget, unit.retain, step) for one in unit.groups]
        if taken is not None:
            taken(unit)
        if (following := _next(queue, make)) is not None:
            heads.append((queue, following))
    return Decision(tuple(removals), "budget" if refused_for_size else "no_candidates")


def _next(
    queue: Iterator[tuple[GroupKind, tuple[Group, ...]]], make: Callable[[GroupKind, tuple[Group, ...]], _Unit]
) -> _Unit | None:
    following = next(queue, None)
    return None if following is None else make(*following)


def _allowed(unit: _Unit, left_kv: int, groups: ModelGroups) -> bool:
    """Say whether the family has a stock checkpoint for the head count that a whole slice would leave."""
    return unit.kind != "kv_group" or len(unit.groups) < groups.depth or left_kv - 1 in groups.allowed_kv_groups
