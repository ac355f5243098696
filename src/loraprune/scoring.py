"""Scoring: passes over a data set that give every group's sensitivity.

Reads    a model with adapters and a mask, batches of one data set
Gives    Sensitivity
Source   LoRAPrune, arXiv 2305.18403; per-example gates; mean activation x column norm; controls
Symbols  consumer = attention output or down projection; its inputs are what a group gives to the rest of the model
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from loraprune.mask import LiveMask
from loraprune.objectives import answer_log_odds, answer_log_probabilities, logits_of, row_means
from loraprune.processes import dealt, sum_gradients, summed
from loraprune.records import DatasetType, GroupKind, LayerGroups, Metric, ProjectionGroups, ScoreLoss, Sensitivity
from loraprune.sensitivity import base_of, compute_sensitivity
from loraprune.settings import Settings

Batch = Mapping[str, Tensor]
Scores = dict[GroupKind, Tensor]  # (L, G) each, float64


def score_model(
    model: PeftModel,
    live: LiveMask,
    batches: Sequence[Batch],
    dataset_type: DatasetType,
    *,
    prune_metric: Metric,
    loss: ScoreLoss,
    power: int = 1,
    third_term: bool = False,
    unit_norm: bool = False,
    seed: int = 0,
) -> Sensitivity:
    """Return the sensitivities of every group for one data set, from scoring passes of their own.

    The model runs in eval mode, without dropout; the loss is the sum over rows of the row's mean over answer tokens,
    so batch size makes no difference. `magnitude` and `random` (which alone reads `seed`) run no pass. Several
    processes run some batches each. Leaves no gradient behind.
    """
    training = model.training
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = training  # its only use of the flag: whether activations are computed twice
    model.zero_grad(set_to_none=True)
    how = {"power": power, "unit_norm": unit_norm}
    rows = 1 if prune_metric in ("random", "magnitude") else sum(len(batch["input_ids"]) for batch in batches)
    if prune_metric == "random":
        scores = random_scores(live, dataset_type, seed)
    elif prune_metric == "gate":
        scores = _score_gates(model, live, batches, dataset_type, loss, how)
    elif prune_metric == "activation":
        scores = _score_activations(model, live, batches, rows, dataset_type, how)
    else:
        if prune_metric != "magnitude":
            _run(model, live, batches, loss, frozen_too=prune_metric == "grad")
        scores = read_weights(model, live, dataset_type, prune_metric, third_term=third_term, **how)
    model.zero_grad(set_to_none=True)
    model.train(training)
    return Sensitivity({kind: (total / rows).cpu() for kind, total in scores.items()})


def as_asked(settings: Settings) -> dict[str, Any]:
    """Return how `score_model` scores under a run's settings."""
    return {
        "prune_metric": settings.metric,
        "loss": settings.score_loss,
        "power": settings.score_power,
        "third_term": settings.third_term,
        "unit_norm": settings.score_norm == "module",
        "seed": settings.seed,
    }


# --- what lies on weights after backward ------------------------------------------------------------------------------


def _run(model: PeftModel, live: LiveMask, batches: Sequence[Batch], loss: ScoreLoss, *, frozen_too: bool) -> None:
    """Leave the gradients of all batches on the adapters, or on the frozen weights in their place."""
    with ExitStack() as stack:
        if frozen_too:
            stack.enter_context(frozen(model))
            stack.enter_context(gradients_on(prunable_weights(model, live)))
        for batch, weight in dealt(batches):
            (weight * _row_losses(model, batch, loss).sum()).backward()
    if not frozen_too:
        sum_gradients(model)


def prunable_weights(model: PeftModel, live: LiveMask) -> list[Tensor]:
    """Return the frozen weights of every projection of which groups are cut."""
    base = model.get_base_model()
    return [base_of(base.get_submodule(projection.module)).weight for _, projection in _cut(live)]


@contextmanager
def gradients_on(weights: Iterable[Tensor]) -> Iterator[None]:
    """Let passes inside this block leave gradients on weights that are frozen outside it."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Spare the gradients of the adapters, which gates and frozen weights do not need."""
    trained = [one for one in model.parameters() if one.requires_grad]
    for one in trained:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in trained:
            one.requires_grad_(True)


def read_weights(
    model: PeftModel, live: LiveMask, dataset_type: DatasetType, prune_metric: Metric, **how: Any
) -> Scores:
    """Return each group's sum over all projections that it cuts, by the gradients that lie there now."""
    scores, base = empty_scores(live), model.get_base_model()
    for one, projection in _cut(live):
        layer = base.get_submodule(projection.module)
        if prune_metric == "lora" and not isinstance(layer, LoraLayer):
            continue
        scores[one.kind][one.layer] += compute_sensitivity(
            layer, one.kind != "ffn_channel", dataset_type, prune_metric, groups=projection, **how
        ).cpu()
    return scores


def _cut(live: LiveMask) -> Iterator[tuple[LayerGroups, ProjectionGroups]]:
    for layers in live.groups.layers.values():
        for one in layers:
            for projection in one.projections:
                yield one, projection


# --- what goes into the consumers -------------------------------------------------------------------------------------


def _score_gates(
    model: PeftModel, live: LiveMask, batches: Sequence[Batch], dataset_type: DatasetType, loss: ScoreLoss, how: Any
) -> Scores:
    scores = empty_scores(live)
    with frozen(model):
        for batch, weight in dealt(batches):
            with live.gates(len(batch["input_ids"]), batch["input_ids"].device) as gates:
                (weight * _row_losses(model, batch, loss).sum()).backward()
            add_gates(scores, model, live, gates, dataset_type, how["power"])
    summed(scores.values())
    return unit_norms(scores) if how["unit_norm"] else scores


def add_gates(
    scores: Scores, model: PeftModel, live: LiveMask, gates: Mapping[Any, Tensor], dataset_type: DatasetType, power: int
) -> None:
    """Add what a backward pass left on the gates of one batch."""

    def read(key: Any) -> dict[str, Tensor | None]:
        return {"gate_gradient": gates[key].grad}

    _add_consumers(scores, model, live, dataset_type, "gate", read, {"power": power})


def unit_norms(scores: Scores) -> Scores:
    """Return sums over all batches by their L2 norm in each layer; norms of single batches would depend on size."""
    return {kind: one / (one.norm(dim=1, keepdim=True) + 1e-6) for kind, one in scores.items()}


def _score_activations(
    model: PeftModel, live: LiveMask, batches: Sequence[Batch], rows: int, dataset_type: DatasetType, how: Any
) -> Scores:
    sizes = {}
    with torch.no_grad():
        for batch, weight in dealt(batches):
            for key, one in _input_sizes(model, live, batch).items():
                sizes[key] = sizes.get(key, 0.0) + weight * one
    summed(sizes.values())
    scores = empty_scores(live)
    _add_consumers(scores, model, live, dataset_type, "activation", lambda key: {"activation": sizes[key] / rows}, how)
    return {kind: one * rows for kind, one in scores.items()}  # a mean already, unlike the other metrics' sums


def _add_consumers(
    scores: Scores,
    model: PeftModel,
    live: LiveMask,
    dataset_type: DatasetType,
    prune_metric: Metric,
    read: Callable[[Any], Mapping[str, Any]],
    how: Any,
) -> None:
    base = model.get_base_model()
    for kind, layers in live.groups.layers.items():
        for one in layers:
            consumer = one.consumer
            scores[kind][one.layer] += compute_sensitivity(
                base.get_submodule(consumer.module),
                kind != "ffn_channel",
                dataset_type,
                prune_metric,
                groups=consumer,
                **read((kind, one.layer)),
                **how,
            ).cpu()


def _input_sizes(model: PeftModel, live: LiveMask, batch: Batch) -> dict[Any, Float[Tensor, " width"]]:
    """Return the sum over rows of each consumer's mean |input| over the row's tokens."""
    sizes, there = {}, batch["attention_mask"].bool()

    def watch(key: Any) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen = arguments[0].float().abs() * there[..., None]
            sizes[key] = (seen.sum(1) / there.sum(1, keepdim=True)).sum(0)

        return hook

    base, handles = model.get_base_model(), []
    for kind, layers in live.groups.layers.items():
        for one in layers:
            module = base.get_submodule(one.consumer.module)  # behind the mask: its hook was there first
            handles.append(module.register_forward_pre_hook(watch((kind, one.layer))))
    try:
        logits_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


# --- shared -----------------------------------------------------------------------------------------------------------


def random_scores(live: LiveMask, dataset_type: DatasetType, seed: int) -> Scores:
    """Return numbers that say nothing, in (0, 1): the control that every other metric must beat."""
    source = torch.Generator().manual_seed(2 * seed + (dataset_type == "retain"))
    return {kind: torch.rand(one.shape, generator=source, dtype=torch.float64) for kind, one in live.value.kept.items()}


def empty_scores(live: LiveMask) -> Scores:
    """Return zeros, one for each group."""
    return {kind: torch.zeros(kept.shape, dtype=torch.float64) for kind, kept in live.value.kept.items()}


def _row_losses(model: nn.Module, batch: Batch, loss: ScoreLoss) -> Float[Tensor, " batch"]:
    logits = logits_of(model, batch)
    measure = answer_log_odds if loss == "log_odds" else answer_log_probabilities
    values, counted = measure(logits, batch["labels"])
    return -row_means(values, counted)
