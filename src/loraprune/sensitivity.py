"""Sensitivity: how much a data set's loss depends on one group.

Reads    adapter weights and gradients, the frozen weight; or the gradients of per-example gates
Gives    one number >= 0 per group and data set; the dual score S and the share S / (1 + S)
Source   LoRAPrune, arXiv 2305.18403, eq. 5-10; differs: third term optional, normalised per data set and kind
Symbols  o out features, i in features, r rank, g groups of a layer, L layers, G groups in each
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from loraprune.mask import LiveMask
from loraprune.objectives import answer_log_odds, answer_log_probabilities, logits_of, row_means
from loraprune.quantised import weight_rows
from loraprune.records import KINDS, DatasetType, GroupKind, Mask, Metric, ProjectionGroups, ScoreLoss, Sensitivity

Number = TypeVar("Number", float, Tensor)
CPU_CHUNK = 2**18  # weights at a time: two float32 buffers of so many stay in a core's cache
GPU_CHUNK = 2**21  # a GPU wants pieces that fill it


class AdapterGradient(NamedTuple):
    """Gradients of one adapter: of A, (r, i), and of B, (o, r)."""

    a: Tensor
    b: Tensor


def compute_sensitivity(
    layer: LoraLayer,
    is_attn: bool,
    dataset_type: DatasetType,
    prune_metric: Metric = "lora",
    epsilon: float = 1e-6,
    *,
    groups: ProjectionGroups,
    gate_gradient: Float[Tensor, "batch 1 width"] | None = None,
    power: int = 1,
    third_term: bool = False,
    unit_norm: bool = False,
) -> Float[Tensor, " g"]:
    """Return the change of one data set's loss per group of one projection, from its gradients alone.

    `lora` reads the gradients that lie on the layer's adapter (arXiv 2305.18403, eq. 8); `gate` reads
    `gate_gradient` of the attention output or down projection, one row per example. Unit: the loss's.
    `unit_norm` divides by the L2 norm over the projection's groups, guarded by `epsilon` (the released code).
    Raises ValueError when `is_attn` and `groups` disagree, or a gradient that the metric needs is missing.
    """
    if is_attn != (groups.kind == "kv_group"):
        raise ValueError(f"{groups.module} has groups of kind {groups.kind}, but is_attn is {is_attn}")
    if dataset_type not in ("forget", "retain"):
        raise ValueError(f"dataset_type is {dataset_type!r}; it must be 'forget' or 'retain'")
    if prune_metric == "gate":
        if gate_gradient is None or groups.axis != 1:
            raise ValueError(
                f"gates lie on attention output and down projections and need gate_gradient: {groups.module}"
            )
        values = gate_importance(gate_gradient, groups, power)
    elif prune_metric == "lora":
        values = adapter_importance(layer, adapter_gradient(layer), groups, power=power, third_term=third_term)
    else:
        raise ValueError(f"prune_metric is {prune_metric!r}; it must be 'lora' or 'gate'")
    return values / (values.norm() + epsilon) if unit_norm else values


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
    """Return the sum over a group's weights of |(gB A + B gA [- gB gA]) * (W + s B A)| ** power.

    Some rows at a time, in two buffers that are used over and over; a quantised weight is dequantised by these rows.
    """
    name = _active_adapter(layer)
    a, b = layer.lora_A[name].get_parameter("weight").detach(), layer.lora_B[name].get_parameter("weight").detach()
    weight, scaled = weight_rows(layer.get_base_layer()), b * layer.scaling[name]
    left = torch.cat([gradient.b, b - gradient.b if third_term else b], 1)  # (o, 2r): one product gives all terms
    right = torch.cat([a, gradient.a])  # (2r, i)
    total = torch.zeros(groups.count * groups.size, dtype=torch.float64, device=a.device)
    for rows, effect, merged in _chunks(left, right, weight.step):
        torch.mm(left[rows], right, out=effect)
        torch.addmm(merged.copy_(weight.of(rows)), scaled[rows], a, out=merged)
        effect = effect.mul_(merged).abs_() if power == 1 else effect.mul_(merged).square_()
        # float32 sums a piece of a row, or some rows; float64 what these come to.
        (total[rows] if groups.axis == 0 else total).add_(effect.sum(1 - groups.axis))
    return total.reshape(groups.count, groups.size).sum(1)


def _chunks(left: Tensor, right: Tensor, step: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Give the rows of left @ right by pieces of a multiple of `step`, each with two buffers of the piece's shape."""
    rows, columns = len(left), right.shape[1]
    fitting = (CPU_CHUNK if left.device.type == "cpu" else GPU_CHUNK) // columns
    size = min(rows, max(step, fitting - fitting % step))
    effect, merged = torch.empty(2, size, columns, dtype=right.dtype, device=right.device)
    for start in range(0, rows, size):
        piece = slice(start, min(start + size, rows))
        yield piece, effect[: piece.stop - start], merged[: piece.stop - start]


def _active_adapter(layer: LoraLayer) -> str:
    names = layer.active_adapters
    if len(names) != 1 or getattr(layer, "use_dora", {}).get(names[0]):
        raise ValueError(f"metric lora holds for one plain adapter, found {names}; use metric gate")
    return names[0]


def score_model(
    model: PeftModel,
    live: LiveMask,
    batches: Iterable[Mapping[str, Tensor]],
    dataset_type: DatasetType,
    *,
    prune_metric: Metric,
    loss: ScoreLoss,
    power: int = 1,
) -> Sensitivity:
    """Return the sensitivities of every group for one data set, from scoring passes of their own.

    The model runs in eval mode, without dropout; the loss is the sum over rows of the row's mean over answer tokens,
    so batch size makes no difference. Leaves no gradient behind.
    """
    training = model.training
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = training  # its only use of the flag: whether activations are computed twice
    model.zero_grad(set_to_none=True)
    score = _score_gates if prune_metric == "gate" else _score_adapters
    totals, rows = score(model, live, batches, dataset_type, loss, power)
    model.zero_grad(set_to_none=True)
    model.train(training)
    return Sensitivity({kind: (total / rows).cpu() for kind, total in totals.items()})


Scored = tuple[dict[GroupKind, Tensor], int]


def _score_gates(
    model: PeftModel,
    live: LiveMask,
    batches: Iterable[Mapping[str, Tensor]],
    dataset_type: DatasetType,
    loss: ScoreLoss,
    power: int,
) -> Scored:
    totals, rows, base = _empty_totals(live), 0, model.get_base_model()
    with _frozen(model):
        for batch in batches:
            rows += len(batch["input_ids"])
            with live.gates(len(batch["input_ids"]), batch["input_ids"].device) as gates:
                _row_losses(model, batch, loss).sum().backward()
            for (kind, index), gate in gates.items():
                consumer = live.groups.layers[kind][index].consumer
                totals[kind][index] += compute_sensitivity(
                    base.get_submodule(consumer.module),  # type: ignore[arg-type]  # adapters on it are not needed here
                    kind == "kv_group",
                    dataset_type,
                    "gate",
                    groups=consumer,
                    gate_gradient=gate.grad,
                    power=power,
                ).cpu()
    return totals, rows


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Spare the gradients of the adapters, which gates do not need."""
    trained = [one for one in model.parameters() if one.requires_grad]
    for one in trained:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in trained:
            one.requires_grad_(True)


def _score_adapters(
    model: PeftModel,
    live: LiveMask,
    batches: Iterable[Mapping[str, Tensor]],
    dataset_type: DatasetType,
    loss: ScoreLoss,
    power: int,
) -> Scored:
    totals, rows, base = _empty_totals(live), 0, model.get_base_model()
    for batch in batches:
        rows += len(batch["input_ids"])
        _row_losses(model, batch, loss).sum().backward()
    for one in (one for kind in KINDS for one in live.groups.layers[kind]):
        for projection in one.projections:
            layer = base.get_submodule(projection.module)
            if isinstance(layer, LoraLayer):
                totals[one.kind][one.layer] += compute_sensitivity(
                    layer, one.kind == "kv_group", dataset_type, "lora", groups=projection, power=power
                ).cpu()
    return totals, rows


def _row_losses(model: nn.Module, batch: Mapping[str, Tensor], loss: ScoreLoss) -> Float[Tensor, " batch"]:
    logits = logits_of(model, batch)
    measure = answer_log_odds if loss == "log_odds" else answer_log_probabilities
    values, counted = measure(logits, batch["labels"])
    return -row_means(values, counted)


def _empty_totals(live: LiveMask) -> dict[GroupKind, Tensor]:
    return {kind: torch.zeros(live.value.kept[kind].shape, dtype=torch.float64) for kind in KINDS}


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
    sensitivity_dict: SensitivityDict, new: Sensitivity, dataset_type: DatasetType, *, kept: Mask, beta: float
) -> SensitivityDict:
    """Return the dictionary with one data set's average advanced by a new score.

    The score is first divided, for every kind, by its mean over the kept groups of the whole model. A score with a
    non-finite number is left out and counted; `nonfinite_layers` says where it was.
    """
    if nonfinite_layers(new):
        return replace(sensitivity_dict, skipped=sensitivity_dict.skipped + 1)
    average = getattr(sensitivity_dict, dataset_type).advanced(normalised(new, kept), beta)
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
