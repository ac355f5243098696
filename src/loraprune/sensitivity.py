"""Sensitivity: how much a data set's loss depends on one group.

Reads    adapter weights and gradients, the frozen weight and its gradient; gradients of gates; sizes of activations
Gives    one number >= 0 per group and data set; the dual score S and the share S / (1 + S)
Source   LoRAPrune, arXiv 2305.18403, eq. 5-10; differs: third term optional, normalised per data set and kind
Symbols  o out features, i in features, r rank, g groups of a layer, L layers, G groups in each
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from loraprune.processes import whole_gradient
from loraprune.quantised import weight_rows
from loraprune.records import DatasetType, GroupKind, Mask, Metric, ProjectionGroups, ScoreNorm, Sensitivity

Number = TypeVar("Number", float, Tensor)
CPU_CHUNK = 2**18  # weights at a time: two float32 buffers of so many stay in a core's cache
GPU_CHUNK = 2**21  # a GPU wants pieces that fill it


class AdapterGradient(NamedTuple):
    """Gradients of one adapter: of A, (r, i), and of B, (o, r)."""

    a: Tensor
    b: Tensor


def compute_sensitivity(
    layer: nn.Module,
    is_attn: bool,
    dataset_type: DatasetType,
    prune_metric: Metric = "lora",
    epsilon: float = 1e-6,
    *,
    groups: ProjectionGroups,
    gate_gradient: Float[Tensor, "batch 1 width"] | None = None,
    activation: Float[Tensor, " width"] | None = None,
    power: int = 1,
    third_term: bool = False,
    unit_norm: bool = False,
) -> Float[Tensor, " g"]:
    """Return the change of one data set's loss per group of one projection, from what its passes left behind.

    `lora` reads the gradients that lie on the layer's adapter (arXiv 2305.18403, eq. 8), `grad` the one on its frozen
    weight, `magnitude` the weight alone; unit: the loss's, for `magnitude` the weight's. `gate` reads `gate_gradient`,
    one row per example, and `activation` the mean size of every input, both of the attention output or down projection.
    `unit_norm` divides by the L2 norm over the projection's groups, guarded by `epsilon` (the released code).
    Raises ValueError when `is_attn` and `groups` disagree, or something that the metric needs is missing.
    """
    if is_attn != (groups.kind != "ffn_channel"):
        raise ValueError(f"{groups.module} has groups of kind {groups.kind}, but is_attn is {is_attn}")
    if dataset_type not in ("forget", "retain"):
        raise ValueError(f"dataset_type is {dataset_type!r}; it must be 'forget' or 'retain'")
    if prune_metric == "gate":
        values = gate_importance(_read_at_consumer("gate_gradient", gate_gradient, groups), groups, power)
    elif prune_metric == "activation":
        values = activation_importance(layer, _read_at_consumer("activation", activation, groups), groups, power)
    elif prune_metric == "lora":
        adapted = _adapted(layer, groups)
        gradient = adapter_gradient(adapted)
        values = adapter_importance(adapted, gradient, groups, power=power, third_term=third_term)
    elif prune_metric in ("grad", "magnitude"):
        values = weight_importance(layer, groups, power, by_gradient=prune_metric == "grad")
    else:
        raise ValueError(f"prune_metric is {prune_metric!r}; it must be lora, gate, grad, activation or magnitude")
    return values / (values.norm() + epsilon) if unit_norm else values


def _read_at_consumer(name: str, given: Tensor | None, groups: ProjectionGroups) -> Tensor:
    if given is None or groups.axis != 1:
        raise ValueError(
            f"{name} is read at attention output and down projections, and is needed there: {groups.module}"
        )
    return given


def compute_dual_sensitivity(
    layer: LoraLayer,
    forget_grad: AdapterGradient | Float[Tensor, "batch 1 width"],
    retain_grad: AdapterGradient | Float[Tensor, "batch 1 width"],
    epsilon: float = 1e-6,
    *,
    groups: ProjectionGroups,
    power: int = 1,
) -> Float[Tensor, " g"]:
    """Return S = I_forget / (I_retain + epsilon) per group of one projection; >= 0, 1 where both sets care alike.

    Each gradient is an adapter's (A, B) pair or a gate's. Each importance is divided by its mean over the groups
    first, so that sets of different size and loss compare.
    """
    importances = [
        gate_importance(one, groups, power)
        if isinstance(one, Tensor)
        else adapter_importance(layer, one, groups, power=power)
        for one in (forget_grad, retain_grad)
    ]
    forget, retain = (_with_mean_one(one, torch.ones_like(one, dtype=torch.bool)) for one in importances)
    return dual_score(forget, retain, epsilon)


def dual_score(forget: Number, retain: Number, epsilon: float) -> Number:
    """Return S = I_forget / (I_retain + epsilon), elementwise."""
    return forget / (retain + epsilon)


def share_of(score: Number) -> Number:
    """Return S / (1 + S), in [0, 1): the part of a group's importance that is the forget set's."""
    return score / (1.0 + score)


def gate_importance(
    gradient: Float[Tensor, "batch 1 width"], groups: ProjectionGroups, power: int
) -> Float[Tensor, " g"]:
    """Return the sum over examples of |effect of removing the group| ** power, from one batch of gates."""
    per_example = gradient[:, 0].double().reshape(len(gradient), groups.count, groups.size).sum(-1)  # (batch, g)
    return per_example.abs().pow(power).sum(0)


def adapter_gradient(layer: LoraLayer) -> AdapterGradient:
    """Return the gradients that lie on a layer's one active adapter; raise ValueError when there are none."""
    name = _active_adapter(layer)
    a, b = layer.lora_A[name].get_parameter("weight").grad, layer.lora_B[name].get_parameter("weight").grad
    if a is None or b is None:
        raise ValueError("the adapter has no gradients: metric lora is read after backward")
    return AdapterGradient(a, b)


def adapter_importance(
    layer: LoraLayer, gradient: AdapterGradient, groups: ProjectionGroups, *, power: int = 1, third_term: bool = False
) -> Float[Tensor, " g"]:
    """Return the sum over a group's weights of |(gB A + B gA [- gB gA]) * (W + s B A)| ** power."""
    name = _active_adapter(layer)
    a, b = (one[name].get_parameter("weight").detach() for one in (layer.lora_A, layer.lora_B))
    left = torch.cat([gradient.b, b - gradient.b if third_term else b], 1)  # (o, 2r): one product gives all terms
    right = torch.cat([a, gradient.a])  # (2r, i)
    return _summed(layer, groups, power, lambda rows, buffer: torch.mm(left[rows], right, out=buffer))


def weight_importance(
    layer: nn.Module, groups: ProjectionGroups, power: int, *, by_gradient: bool
) -> Float[Tensor, " g"]:
    """Return the sum over a group's weights of |W + s B A| ** power, each times its own gradient where asked for.

    Raises ValueError when there should be a gradient and is none.
    """
    gradient = whole_gradient(base_of(layer).weight) if by_gradient else None
    if by_gradient and gradient is None:
        raise ValueError(f"{groups.module} has no gradient: metric grad is read after backward over the frozen weights")
    return _summed(layer, groups, power, None if gradient is None else lambda rows, buffer: gradient[rows])


def activation_importance(
    layer: nn.Module, activation: Float[Tensor, " width"], groups: ProjectionGroups, power: int
) -> Float[Tensor, " g"]:
    """Return the sum over a group's columns of (mean |input| x L2 norm of the column of W + s B A) ** power."""
    whole = replace(groups, count=groups.count * groups.size, size=1)
    norms = _summed(layer, whole, 2, None).sqrt()
    sizes = (activation.to(norms.device).double() * norms).pow(power)
    return sizes.reshape(groups.count, groups.size).sum(1)


Factor = Callable[[slice, Tensor], Tensor]  # of some rows, (rows, i), perhaps written into the buffer that is given


def _summed(
    layer: nn.Module | LoraLayer, groups: ProjectionGroups, power: int, factor: Factor | None
) -> Float[Tensor, " g"]:
    """Return the sums over each group of |factor * (W + s B A)| ** power.

    Some rows at a time, in two buffers that are used over and over; a quantised weight is dequantised by these rows.
    """
    base = base_of(layer)
    weight, low_rank = weight_rows(base), _low_rank(layer)
    total = torch.zeros(groups.count * groups.size, dtype=torch.float64, device=base.weight.device)
    first, last, _ = (groups.span if groups.axis == 0 else slice(None)).indices(base.out_features)
    for rows, merged, buffer in _pieces(first, last, base.in_features, weight.step, total.device):
        aligned = rows.start - rows.start % weight.step
        merged.copy_(weight.of(slice(aligned, rows.stop))[rows.start - aligned :])
        if low_rank is not None:
            torch.addmm(merged, low_rank[0][rows], low_rank[1], out=merged)
        if factor is not None:
            merged.mul_(factor(rows, buffer))
        values = merged.abs_() if power == 1 else merged.square_()
        # float32 sums a piece of a row, or some rows; float64 what these come to.
        place = slice(rows.start - first, rows.stop - first)
        (total[place] if groups.axis == 0 else total).add_(values.sum(1 - groups.axis))
    return total.reshape(groups.count, groups.size).sum(1)


def _low_rank(layer: nn.Module | LoraLayer) -> tuple[Tensor, Tensor] | None:
    """Return s B and A, None where the layer has no adapter."""
    if not isinstance(layer, LoraLayer):
        return None
    name = _active_adapter(layer)
    a, b = (one[name].get_parameter("weight").detach().float() for one in (layer.lora_A, layer.lora_B))
    return b * layer.scaling[name], a


def _pieces(
    first: int, last: int, columns: int, step: int, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Give the rows from `first` to `last` by pieces of a multiple of `step`, each with two buffers of its shape."""
    fitting = (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // columns
    size = min(last - first, max(step, fitting - fitting % step))
    buffers = torch.empty(2, size, columns, device=device)
    for start in range(first, last, size):
        rows = slice(start, min(start + size, last))
        merged, buffer = buffers[:, : rows.stop - start]
        yield rows, merged, buffer


def base_of(layer: nn.Module | LoraLayer) -> Any:
    """Return the frozen linear layer under an adapter, or the layer itself where it has none."""
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _adapted(layer: nn.Module, groups: ProjectionGroups) -> LoraLayer:
    if not isinstance(layer, LoraLayer):
        raise ValueError(f"{groups.module} carries no adapter: metric lora sees nothing of it")
    return layer


def _active_adapter(layer: LoraLayer) -> str:
    names = layer.active_adapters
    if len(names) != 1 or getattr(layer, "use_dora", {}).get(names[0]):
        raise ValueError(f"metric lora holds for one plain adapter, found {names}; use metric gate")
    return names[0]


@dataclass(frozen=True)
class MovingAverage:
    """Bias-corrected average over time of normalised sensitivities; `weight` = 1 - beta ** (times averaged)."""

    totals: Mapping[GroupKind, Tensor] | None = None
    weight: float = 0.0

    def values(self) -> dict[GroupKind, Tensor]:
        """Return the averages, (L, G) each; raise ValueError before the first score."""
        if self.totals is None:
            raise ValueError("nothing has been scored yet")
        return {kind: total / self.weight for kind, total in self.totals.items()}

    def advanced(self, new: Mapping[GroupKind, Tensor], beta: float) -> "MovingAverage":
        past = self.totals or {kind: torch.zeros_like(one) for kind, one in new.items()}
        totals: dict[GroupKind, Tensor] = {kind: beta * past[kind] + (1.0 - beta) * new[kind] for kind in new}
        return MovingAverage(totals, beta * self.weight + (1.0 - beta))


@dataclass(frozen=True)
class SensitivityDict:
    """Both sets' averages, the score made of them, and how often a non-finite score was left out."""

    forget: MovingAverage = MovingAverage()
    retain: MovingAverage = MovingAverage()
    skipped: int = 0

    @staticmethod
    def of(forget: Mapping[GroupKind, Tensor] | None, retain: Mapping[GroupKind, Tensor]) -> "SensitivityDict":
        """Return a dictionary that holds these averages as they are."""
        return SensitivityDict(MovingAverage(forget, 1.0) if forget else MovingAverage(), MovingAverage(retain, 1.0))

    def scores(self, epsilon: float) -> dict[GroupKind, Tensor]:
        """Return the dual score S of every group, (L, G) for every kind."""
        forget, retain = self.forget.values(), self.retain.values()
        return {kind: dual_score(forget[kind], retain[kind], epsilon) for kind in forget}

    def candidates(self, threshold: float, epsilon: float) -> dict[GroupKind, Tensor]:
        """Return which groups matter more to the forget set than the threshold allows: share > threshold."""
        return {kind: share_of(score) > threshold for kind, score in self.scores(epsilon).items()}


def update_sensitivity_dict(
    sensitivity_dict: SensitivityDict,
    new: Sensitivity,
    dataset_type: DatasetType,
    *,
    kept: Mask,
    beta: float,
    norm: ScoreNorm = "mean",
) -> SensitivityDict:
    """Return the dictionary with one data set's average advanced by a new score.

    Under norm `mean` the score is first divided, for every kind, by its mean over the kept groups of the whole model;
    else it is averaged as it came. A score with a non-finite number is left out and counted; `nonfinite_layers` says
    where it was.
    """
    if nonfinite_layers(new):
        return replace(sensitivity_dict, skipped=sensitivity_dict.skipped + 1)
    values = normalised(new, kept) if norm == "mean" else new.values
    average = getattr(sensitivity_dict, dataset_type).advanced(values, beta)
    if dataset_type == "forget":
        return replace(sensitivity_dict, forget=average)
    return replace(sensitivity_dict, retain=average)


def nonfinite_layers(score: Sensitivity) -> list[tuple[GroupKind, int]]:
    """Return the kinds and layers in which a score is not finite."""
    return [
        (kind, layer)
        for kind, values in score.values.items()
        for layer, row in enumerate(values)
        if not row.isfinite().all()
    ]


def normalised(score: Sensitivity, kept: Mask) -> dict[GroupKind, Tensor]:
    """Return the score with mean 1 over the kept groups of each kind, 0 at removed ones."""
    return {kind: _with_mean_one(values, kept.kept[kind]) for kind, values in score.values.items()}


def _with_mean_one(values: Tensor, kept: Tensor) -> Tensor:
    mean = values[kept].mean()
    return torch.where(kept, values / mean, 0.0) if mean > 0 else torch.where(kept, 1.0, 0.0).double()
