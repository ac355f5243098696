"""Decision: which groups go, in which order; a value, not an action.

Reads    sensitivities averaged over time, (L, G) for every kind, the present mask, a budget in parameters
Gives    the groups to remove now, and what ended the list
Source   -
Symbols  unit = each layer's best remaining groups of a kind, down to the next width that may stand (per-layer widths:
         of one layer), of q_heads each kv_group's best; chain = units that go one after the other; C chains, U units
         in each; S = dual score
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loraprune.records import Decision, Group, GroupKind, LayerGroups, Mask, ModelGroups, Removal
from loraprune.rules import Rules, allowed_widths, frozen_layers
from loraprune.sensitivity import dual_score, share_of

Scores = Mapping[GroupKind, Tensor]


@dataclass(frozen=True)
class _Units:
    """The units of one kind, (C, U); those that a layer is past already are empty."""

    kind: GroupKind
    order: Tensor  # (L, G): each layer's groups, best first
    number: Tensor  # (L, G): the unit of the group at that place of the order; C * U for groups that stay
    size: Tensor  # (C, U): groups
    parameters: Tensor  # (C, U)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of (L, G) values over each unit's groups, (C, U)."""
        total = _sum_by_unit(self.number, values.gather(1, self.order), self.size.shape)
        return total / self.size.clamp(min=1)

    def members(self) -> tuple[list[int], list[int], list[int]]:
        """Return layer and index of every group, unit by unit, and where each unit begins."""
        places = self.number.flatten().argsort(stable=True)
        layers = places.div(self.order.shape[1], rounding_mode="floor")
        begins = torch.cat([torch.zeros(1, dtype=torch.long), self.size.flatten().cumsum(0)])
        return layers.tolist(), self.order.flatten()[places].tolist(), begins.tolist()


@dataclass(frozen=True)
class _Ranked:
    """Units with what is said of them, (C, U) each; the lowest `key` goes first."""

    units: _Units
    key: Tensor
    candidate: Tensor
    share: Tensor | None
    forget: Tensor | None
    retain: Tensor


def decide_unlearning(
    forget: Scores, retain: Scores, kept: Mask, groups: ModelGroups, *, budget: int, rules: Rules, step: int = 0
) -> Decision:
    """Return the groups that go now: candidates, the most worth forgetting first, while they fit into `budget`.

    That is counted in parameters. A group's worth is what the forget set loses with it less what the retain set does,
    or the share. Candidates have a share above the threshold, or are all groups where the rules ask for a size. Under
    uniform widths a candidate takes every layer down to the next width that may stand; its share and its worth are made
    of the summed sensitivities of all its groups.
    """
    ranked = []
    for kind in sorted(groups.layers):
        order = _order(_worth_forgetting(forget[kind], retain[kind], kept.kept[kind], rules), groups.layers[kind])
        units = _units(kind, order, kept, groups, rules)
        cared, needed = units.mean(forget[kind]), units.mean(retain[kind])
        share = share_of(dual_score(cared, needed, rules.epsilon))
        worth = _worth(cared, needed, share, rules)
        candidate = torch.ones_like(share, dtype=torch.bool) if rules.all_may_go else _above(share, cared, rules)
        ranked.append(_Ranked(units, -worth, candidate, share, cared, needed))
    return _decision(ranked, budget, step)


def decide_compression(
    retain: Scores,
    kept: Mask,
    groups: ModelGroups,
    *,
    budget: int,
    rules: Rules,
    step: int = 0,
    fraction: float | None = None,
) -> Decision:
    """Return the groups of lowest sensitivity that go now, worth `budget` parameters.

    What loses the same fraction, as nearly as possible, is each layer, each kind, or nothing: then all groups stand in
    one ranking. `fraction` is what may be gone of each, in place of a budget.
    """
    ranked = []
    for kind in sorted(groups.layers):
        order = _order(torch.where(kept.kept[kind], -retain[kind], -torch.inf), groups.layers[kind])
        units = _units(kind, order, kept, groups, rules)
        needed = units.mean(retain[kind])
        key = _compression_key(units, needed, kept.kept[kind], rules)
        candidate = key.isfinite() if fraction is None else key <= fraction + ROUNDING
        ranked.append(_Ranked(units, key, candidate, None, None, needed))
    decision = _decision(ranked, budget, step)
    return decision if fraction is None else replace(decision, ended_by="budget")


ROUNDING = 1e-9  # of a fraction: 0.3 of 10 groups is 3 of them, not 2


def _compression_key(units: _Units, needed: Tensor, kept: Tensor, rules: Rules) -> Tensor:
    """Return by what units go, (C, U), lowest first: the fraction gone once they are, or how little they matter."""
    if rules.budget == "global":
        weight = units.parameters / units.size.clamp(min=1) if rules.per_parameter else torch.ones_like(needed)
        return needed / weight.clamp(min=1)
    gone = _layer_gone(units, kept) if rules.budget == "layer" else _fraction_gone(units, needed, kept)
    return gone if units.kind == "ffn_channel" else gone / rules.attention_ratio


def _layer_gone(units: _Units, kept: Tensor) -> Tensor:
    """Return which part of a unit's layers is gone once the unit is."""
    layers = len(kept) // len(units.size)  # of one chain: all under uniform widths, else one
    before = (~kept).sum(1).reshape(len(units.size), layers).sum(1, keepdim=True)
    return (before + units.size.cumsum(1)).double() / (layers * kept.shape[1])


def _worth_forgetting(forget: Tensor, retain: Tensor, kept: Tensor, rules: Rules) -> Tensor:
    """Return by what each layer's groups go, (L, G), highest first, those that are gone last.

    Where only candidates may go, all others stand behind them, and dead ones, which forget nothing, behind these.
    """
    share = share_of(dual_score(forget, retain, rules.epsilon))
    worth = _worth(forget, retain, share, rules)
    if not rules.all_may_go:
        behind = (~_above(share, forget, rules)).double() + (forget < rules.minimum_forget)
        worth = worth - behind * (worth.max() - worth.min() + 1)
    return torch.where(kept, worth, -torch.inf)


def _worth(forget: Tensor, retain: Tensor, share: Tensor, rules: Rules) -> Tensor:
    """Return what the forget set loses with a group less what the retain set does, or the share, as the rules say."""
    return forget - rules.retain_cost * retain if rules.order == "difference" else share


def _above(share: Tensor, forget: Tensor, rules: Rules) -> Tensor:
    return (share > rules.threshold) & (forget >= rules.minimum_forget)


def _order(worth: Tensor, layers: Sequence[LayerGroups]) -> Tensor:
    """Return each layer's groups, (L, G), highest first; the divisions of a layer give one each in turn."""
    parts = worth.reshape(len(worth), layers[0].divisions, -1)
    best = parts.sort(dim=2, descending=True, stable=True).indices
    begins = torch.arange(0, worth.shape[1], parts.shape[2])[:, None]
    return (best + begins).transpose(1, 2).reshape(worth.shape)


def _units(kind: GroupKind, order: Tensor, kept: Mask, groups: ModelGroups, rules: Rules) -> _Units:
    """Cut each layer's order where the layer reaches an allowed width: one chain for all layers, or one a layer."""
    left = kept.kept[kind].sum(1)
    uniform = rules.widths == "uniform"
    highest = int(left.min() if uniform else left.max())
    widths = torch.tensor([one for one in allowed_widths(kind, groups, rules) if one < highest], dtype=torch.long)
    shape = (1 if uniform else len(left), len(widths))
    places = torch.arange(order.shape[1]).repeat(len(order), 1)
    unit = torch.searchsorted(left[:, None] - widths, places, right=True)
    chain = torch.zeros(len(left), dtype=torch.long) if uniform else torch.arange(len(left))
    stays = unit >= len(widths)
    stays[list(frozen_layers(rules, groups.depth))] = True
    number = torch.where(stays, shape[0] * shape[1], unit + chain[:, None] * len(widths))
    cost = torch.tensor([[one.parameters_per_group] for one in groups.layers[kind]]).expand_as(order)
    size = _sum_by_unit(number, torch.ones_like(order), shape)
    return _Units(kind, order, number, size.long(), _sum_by_unit(number, cost, shape).long())


def _sum_by_unit(number: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the sums of values over each unit, (C, U), float64."""
    count = shape[0] * shape[1]
    return torch.bincount(number.flatten(), values.double().flatten(), minlength=count + 1)[:count].reshape(*shape)


def _fraction_gone(units: _Units, mean: Tensor, kept: Tensor) -> Tensor:
    """Return which part of the kind is gone once a unit is, when the units of lowest mean go first."""
    first = mean.cummax(1).values.flatten().argsort(stable=True)
    gone = torch.empty(len(first), dtype=torch.float64)
    gone[first] = (units.size.flatten()[first].cumsum(0) + (~kept).sum()).double()
    return gone.reshape(mean.shape) / kept.numel()


def _decision(ranked: Sequence[_Ranked], budget: int, step: int) -> Decision:
    taken, refused = _taken(ranked, budget)
    return Decision(tuple(_removals(ranked, taken, step)), "budget" if refused else "no_candidates")


def _taken(ranked: Sequence[_Ranked], budget: int) -> tuple[list[tuple[int, int]], bool]:
    """Take units, lowest key first, each after those before it in its chain, until nothing fits or is a candidate.

    Returns which of `ranked` and which unit, in order, and whether a candidate was refused for its size.
    """
    taken, ended = [], set()
    for which, chain, unit, parameters in _queue(ranked):
        if (which, chain) in ended:
            continue
        if parameters > budget:
            ended.add((which, chain))
            continue
        budget -= parameters
        taken.append((which, unit))
    return taken, bool(ended)


def _queue(ranked: Sequence[_Ranked]) -> Iterator[tuple[int, int, int, int]]:
    """Give (which of `ranked`, chain, unit, parameters) of the candidates: a chain ends at its first other unit."""
    columns: list[list[Tensor]] = []
    for which, one in enumerate(ranked):
        there = one.units.size > 0
        open_so_far = (one.candidate | ~there).cummin(1).values & there
        chain, place = open_so_far.nonzero(as_tuple=True)
        key = torch.where(there, one.key, -torch.inf).cummax(1).values  # a unit waits for those before it
        unit = chain * there.shape[1] + place
        columns.append(
            [key[chain, place], torch.full_like(chain, which), chain, unit, one.units.parameters[chain, place]]
        )
    key, *said = (torch.cat(column) for column in zip(*columns, strict=True))
    order = key.argsort(stable=True)
    return zip(*(one[order].tolist() for one in said), strict=True)


def _removals(ranked: Sequence[_Ranked], taken: Sequence[tuple[int, int]], step: int) -> Iterator[Removal]:
    """Give the removals of the units taken, in order; within a unit by layer, then best first."""
    members, said = [one.units.members() for one in ranked], [_said(one) for one in ranked]
    for which, unit in taken:
        (layers, indices, begins), kind = members[which], ranked[which].units.kind
        for place in range(begins[unit], begins[unit + 1]):
            yield Removal(Group(layers[place], kind, indices[place]), *said[which][unit], step)


def _said(ranked: _Ranked) -> list[tuple[Any, Any, Any]]:
    """Return share, forget and retain of every unit; None where there is no such number."""
    nothing = [None] * ranked.key.numel()
    share, forget, retain = (
        nothing if one is None else one.flatten().tolist() for one in (ranked.share, ranked.forget, ranked.retain)
    )
    return list(zip(share, forget, retain, strict=True))
