"""Records: the frozen values that stages hand each other.

Reads    nothing
Gives    Group, ProjectionGroups, LayerGroups, ModelGroups, Mask, Sensitivity, Removal, Decision, Look, RunReport
Source   -
Symbols  L layers, G groups of a kind in a layer; "kept" is a boolean array (L, G)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

AttentionUnit = Literal["kv_group", "q_head"]
GroupKind = Literal["kv_group", "q_head", "ffn_channel"]  # a model has two: its attention unit, and channels
DatasetType = Literal["forget", "retain"]
Metric = Literal["lora", "gate", "grad", "activation", "magnitude", "random"]
OF_TRAINING: tuple[Metric, ...] = ("lora", "gate", "grad", "magnitude", "random")  # read from a training step
ScoreNorm = Literal["mean", "module", "none"]  # what a score is divided by before it is averaged over time
ScoreFrom = Literal["passes", "training"]
Schedule = Literal["cubic", "released"]
Budget = Literal["layer", "kind", "global"]  # what loses the same fraction under compression
ScoreLoss = Literal["nll", "log_odds"]
Order = Literal["difference", "share"]  # by what groups go under unlearning
Widths = Literal["uniform", "per_layer"]  # the same in every layer, or each layer its own
Compat = Literal["none", "open-unlearning"]  # whose attention mask an evaluation takes; see answers.py
Limit = Literal["floor", "guard", "ceiling", "band", "room"]  # what an accepted step must hold; see steering.py
EndedBy = Literal["budget", "no_candidates", "target", "floor", "guard", "ceiling", "band", "room"]  # not the run
Outcome = Literal["target_reached", "budget_spent", "no_candidates", "floor_reached"]


@dataclass(frozen=True, order=True)
class Group:
    """The smallest thing removed."""

    layer: int
    kind: GroupKind
    index: int


@dataclass(frozen=True)
class ProjectionGroups:
    """How the groups lie in one module: `count` blocks of `size` rows (axis 0) or columns (axis 1) from `start` on.

    A fused module, such as queries, keys and values in one, has one of these for each of its parts.
    """

    module: str
    kind: GroupKind
    axis: Literal[0, 1]
    count: int
    size: int
    start: int = 0

    @property
    def span(self) -> slice:
        """Return the rows or columns of the module in which the groups lie."""
        return slice(self.start, self.start + self.count * self.size)


@dataclass(frozen=True)
class LayerGroups:
    """All groups of one kind in one layer, with every projection that they cut."""

    layer: int
    kind: GroupKind
    count: int
    producers: tuple[ProjectionGroups, ...]  # q, k, v (q alone for q_heads) or gate, up: rows go
    consumer: ProjectionGroups  # o or down: columns go
    parameters_per_group: int
    norms: tuple[ProjectionGroups, ...] = ()  # those that span all groups: cut with them, and scored by no metric
    divisions: int = 1  # equal runs of the groups, of which each loses the same number: of q_heads the kv_groups

    @property
    def projections(self) -> tuple[ProjectionGroups, ...]:
        return (*self.producers, self.consumer)

    @property
    def by_module(self) -> dict[str, tuple[ProjectionGroups, ...]]:
        """Return everything that is cut with a group, the parts of one module together."""
        parts = (*self.projections, *self.norms)
        return {one.module: tuple(part for part in parts if part.module == one.module) for one in parts}


@dataclass(frozen=True)
class ModelGroups:
    """All groups of a model, by kind and layer; every layer has the same number of a kind."""

    family: str
    layers: Mapping[GroupKind, tuple[LayerGroups, ...]]
    total_parameters: int
    allowed_attention: frozenset[int]  # numbers of kept attention groups for which the family has a stock checkpoint

    def count(self, kind: GroupKind) -> int:
        return self.layers[kind][0].count

    def slice_parameters(self, kind: GroupKind) -> int:
        """Return the parameters of one slice: one group of the kind in every layer."""
        return sum(layer.parameters_per_group for layer in self.layers[kind])

    @property
    def attention(self) -> AttentionUnit:
        """Return which kind the groups of attention are."""
        return "kv_group" if "kv_group" in self.layers else "q_head"

    @property
    def depth(self) -> int:
        return len(self.layers["ffn_channel"])


@dataclass(frozen=True)
class Mask:
    """Which groups are kept: for every kind a boolean tensor (L, G); and what the kept ones are multiplied by.

    `factors`: for every kind a float32 tensor (L,); empty where survivors are not rescaled.
    """

    kept: Mapping[GroupKind, "Tensor"]
    factors: Mapping[GroupKind, "Tensor"] = field(default_factory=dict)

    def factor(self, kind: GroupKind, layer: int) -> float:
        """Return what the inputs of a layer's consumer are multiplied by."""
        return float(self.factors[kind][layer]) if self.factors else 1.0

    def tensors(self) -> "dict[str, Tensor]":
        """Return the mask as a file holds it: kept groups by kind, factors by kind and "factor"."""
        return {**self.kept, **{f"{kind}.factor": one for kind, one in self.factors.items()}}

    @staticmethod
    def from_tensors(tensors: "Mapping[Any, Tensor]") -> "Mask":
        """Return the mask that `tensors` gave."""
        factors: dict[Any, Tensor] = {
            name.removesuffix(".factor"): one for name, one in tensors.items() if name.endswith(".factor")
        }
        return Mask({name: one for name, one in tensors.items() if not name.endswith(".factor")}, factors)

    def removed_parameters(self, groups: ModelGroups) -> int:
        return sum(
            int((~self.kept[kind][one.layer]).sum()) * one.parameters_per_group
            for kind, layers in groups.layers.items()
            for one in layers
        )

    def sparsity(self, groups: ModelGroups) -> float:
        """Return removed parameters / all parameters."""
        return self.removed_parameters(groups) / groups.total_parameters

    def without(self, removed: "tuple[Removal, ...]") -> "Mask":
        """Return the mask with these groups removed as well."""
        kept: dict[GroupKind, Tensor] = {kind: one.clone() for kind, one in self.kept.items()}
        for one in removed:
            kept[one.group.kind][one.group.layer, one.group.index] = False
        return dataclasses.replace(self, kept=kept)


@dataclass(frozen=True)
class Sensitivity:
    """How much one data set's loss depends on each group: for every kind a float64 tensor (L, G), >= 0."""

    values: Mapping[GroupKind, "Tensor"]


@dataclass(frozen=True)
class Removal:
    """One group that goes, and why; sensitivities have mean 1 over the unpruned groups of the kind."""

    group: Group
    share: float | None  # None in plain compression
    forget: float | None
    retain: float
    step: int


def removal_columns(removals: Sequence[Removal]) -> dict[str, list[Any]]:
    """Return removals as plain columns, one for each thing said of them: a row a group would be ten times the size."""
    places: dict[str, list[Any]] = {
        name: [getattr(one.group, name) for one in removals] for name in ("layer", "kind", "index")
    }
    return places | {name: [getattr(one, name) for one in removals] for name in _SAID}


def removals_from(columns: Mapping[str, Sequence[Any]]) -> list[Removal]:
    """Return the removals that `removal_columns` wrote."""
    groups = map(Group, columns["layer"], columns["kind"], columns["index"])
    return [Removal(group, *said) for group, *said in zip(groups, *(columns[name] for name in _SAID), strict=True)]


_SAID = ("share", "forget", "retain", "step")


Interval = tuple[float, float]  # 95% bootstrap interval of a number


@dataclass(frozen=True)
class Look:
    """The model as it is at one moment, in the numbers that steer a run; what a run does not have is None or empty."""

    sparsity: float  # removed / all parameters
    retention: float  # P / P_before on the floor rows
    retention_interval: Interval | None  # None where the floor rows are of one fact only
    forget: float | None  # P(forget); None in compression
    forget_interval: Interval | None
    guard_loss_ratio: float | None  # loss / loss_before on the guard text
    already_forgotten: tuple[float, ...]  # P of each earlier request's forget set
    groups: Mapping[GroupKind, tuple[int, ...]]  # kept groups, a number a layer

    def as_values(self) -> dict[str, Any]:
        """Return the numbers as one line of events.jsonl has them; those that the run does not have are left out."""
        values = dataclasses.asdict(self)
        return {name: one for name, one in values.items() if one is not None and one != ()}

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> "Look":
        """Return the look that `as_values` wrote."""
        lists = {name: tuple(one) for name, one in values.items() if isinstance(one, list | tuple)}
        groups = {kind: tuple(kept) for kind, kept in values["groups"].items()}
        absent = {one.name: None for one in dataclasses.fields(Look)} | {"already_forgotten": ()}
        return Look(**{**absent, **values, **lists, "groups": groups})


@dataclass(frozen=True)
class Decision:
    """Which groups go, in which order, what ended the list, and the model as it was accepted without them."""

    removals: tuple[Removal, ...]
    ended_by: EndedBy
    look: Look | None = None


@dataclass(frozen=True)
class RunReport:
    """What a run hands back: its folder, its metrics (the content of metrics.json) and whether its goal was met."""

    folder: Path
    metrics: Mapping[str, Any]
    goal_met: bool
