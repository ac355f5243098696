"""Rivals of the arena that the product has not: what each makes of a world's model, and where it writes it.

Reads    a world, a point of the rival's grid
Gives    full_npo, rmu, damping: each writes a checkpoint
Source   NPO on all weights, arXiv 2404.05868; RMU, 2403.03218; SSD, 2308.07707
Symbols  P = performance; F = diagonal of the Fisher information, one number a weight
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adamw import take_steps
from arena_worlds import Values, World
from torch import Tensor, nn

from loraprune.attack_relearn import FULL_RATE
from loraprune.batches import PairedBatches
from loraprune.data import Example, collate, on_device
from loraprune.evaluate import answer_values, measure
from loraprune.export import export_model
from loraprune.groups import find_groups
from loraprune.mask import full_mask
from loraprune.model import attach_lora, load_model, load_tokenizer, pad_token_id
from loraprune.objectives import answer_log_probabilities, forget_loss, logits_of, retain_loss, row_sums
from loraprune.schedule import learning_rate_factor
from loraprune.settings import Settings
from loraprune.steering import Target, find_target

Batch = Mapping[str, Tensor]
Loss = Callable[[Mapping[str, Batch]], Tensor]  # of a training step, from a batch of each set
RMU_LAYERS, RMU_RATE = 3, 1e-3
AS_IT_IS: Values = {"relearning_radius": 0.0}  # the forget loss is taken where the weights are


def steps_of_rival(settings: Settings, rows: int) -> Values:
    """Return the settings that name a rival's steps, each of which passes `rows` rows: in all it never passes fewer
    rows than a run of `settings` does with its scoring."""
    ours = rows_of_step(settings)
    scored = 2 * settings.score_rows
    return {
        "warmup_steps": -(-settings.warmup_steps * ours // rows),
        "prune_every": -(-(settings.prune_every * ours + scored) // rows),
        "finish_steps": -(-settings.finish_steps * ours // rows),
    }


def rows_of_step(settings: Settings) -> int:
    """Return the rows that a step passes.

    A loss that looks ahead passes those of the forget set twice, and reads them once without gradients, for a third.
    """
    kept, forgotten = settings.retain_batch_size, settings.forget_batch_size
    return kept + forgotten + (forgotten + forgotten // 3 if settings.relearning_radius else 0)


class Steps(NamedTuple):
    """How many steps warm up, come before the learning rate falls, and are taken in all."""

    warmup: int
    main: int
    end: int


def steps_of(settings: Settings) -> Steps:
    """Return the steps of a rival that passes each batch once."""
    steps = steps_of_rival(settings, rows_of_step(replace(settings, **AS_IT_IS)))
    main = steps["warmup_steps"] + steps["prune_every"] * settings.prune_rounds
    return Steps(steps["warmup_steps"], main, main + steps["finish_steps"])


# --- NPO with all weights ---------------------------------------------------------------------------------------------


def full_npo(world: World, point: Values, folder: Path) -> None:
    """Train all weights on retain + ratio x NPO, which fades towards the target as it does in a run."""
    settings, forget = world.settings, world.inputs.examples["forget"]
    model, target = load_model(settings.model, settings), _target(world)
    sizes: Values = {"batch_size": settings.evaluate_batch_size, "pad_token_id": pad_token_id(world.inputs.tokenizer)}
    untouched = answer_values(model, forget, **sizes).log_probability.float().to(model.device)
    begun = measure(model, forget, **sizes).performance

    def loss(batches: Mapping[str, Batch]) -> Tensor:
        kept, pushed = batches["retain"], batches["forget"]
        values, counted = answer_log_probabilities(logits_of(model, pushed), pushed["labels"])
        rows, tokens = row_sums(values, counted), counted.sum(1)
        way = target.way_left(float((rows.detach() / tokens).exp().mean()), begun)
        down = forget_loss("npo", rows, tokens, untouched[pushed["rows"]], settings.forget_loss_beta)
        return retain_loss(logits_of(model, kept), kept["labels"]) + point["forget_retain_ratio"] * way * down

    _train(world, model.parameters(), loss, steps_of(settings), settings.learning_rate * FULL_RATE)
    _write(model, world, folder)


def _target(world: World) -> Target:
    """Return where a run would steer P(forget): the reference's."""
    settings = world.settings
    reference = load_model(str(settings.reference), settings)
    pad = pad_token_id(load_tokenizer(str(settings.reference), settings))
    rows = world.inputs.for_reference["forget"]
    known = measure(reference, rows, batch_size=settings.evaluate_batch_size, pad_token_id=pad)
    target = find_target(settings, {"reference": {"forget": {"performance": known.performance}}})
    assert target is not None  # there is a forget set
    return target


# --- RMU --------------------------------------------------------------------------------------------------------------


def rmu(world: World, point: Values, folder: Path) -> None:
    """Steer one layer's states on forget rows to a random direction, hold them on retain rows.

    Trained are the down projections of that layer and the two before it, as in the published code. differs: states
    and the steering vector are in units of the untouched model's mean norm on retain rows, so that one grid serves
    models of any size.
    """
    settings = world.settings
    model, untouched = load_model(settings.model, settings), load_model(settings.model, settings)
    layers = model.get_decoder().layers
    number = len(layers) // 2
    trained = [one.mlp.down_proj.weight for one in layers[max(0, number + 1 - RMU_LAYERS) : number + 1]]
    model.requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(True)
    direction = torch.rand(model.config.hidden_size, generator=torch.Generator().manual_seed(settings.seed))
    steered = (point["steering"] * direction / direction.norm()).to(model.device)

    def loss(batches: Mapping[str, Batch]) -> Tensor:
        kept, pushed = batches["retain"], batches["forget"]
        with torch.no_grad():
            before = _states(untouched, number, kept)
        unit = before.norm(dim=1).mean()
        forgotten = (_states(model, number, pushed) / unit - steered).square().sum(1).mean()
        held = ((_states(model, number, kept) - before) / unit).square().sum(1).mean()
        return forgotten + point["alpha"] * held

    _train(world, trained, loss, steps_of(settings), RMU_RATE)
    _write(model, world, folder)


def _states(model: Any, layer: int, batch: Batch) -> Tensor:
    """Return a layer's output at every token that is there, (tokens, hidden)."""
    seen: list[Tensor] = []
    handle = (
        model.get_decoder()
        .layers[layer]
        .register_forward_hook(
            lambda module, arguments, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    try:
        logits_of(model, batch)
    finally:
        handle.remove()
    return seen[0][batch["attention_mask"].bool()]


# --- SSD --------------------------------------------------------------------------------------------------------------


def damping(world: World, point: Values, folder: Path) -> None:
    """Damp every weight with F_forget > alpha F_retain by F_retain / F_forget, then repair as ours is repaired."""
    settings, examples = world.settings, world.inputs.examples
    model = load_model(settings.model, settings)
    pad = pad_token_id(world.inputs.tokenizer)
    forget, retain = (_fisher(model, examples[name], pad) for name in ("forget", "taught"))
    with torch.no_grad():
        for weight, cared, needed in zip(model.parameters(), forget, retain, strict=True):
            weight.mul_(torch.where(cared > point["alpha"] * needed, (needed / cared).clamp(max=1.0), 1.0))
    adapted = attach_lora(model, settings)

    def loss(batches: Mapping[str, Batch]) -> Tensor:
        return retain_loss(logits_of(adapted, batches["retain"]), batches["retain"]["labels"])

    trained = [one for one in adapted.parameters() if one.requires_grad]
    _train(world, trained, loss, Steps(0, 0, settings.finish_steps), settings.learning_rate)
    _write(adapted.merge_and_unload(), world, folder)


def _fisher(model: nn.Module, examples: Sequence[Example], pad: int) -> list[Tensor]:
    """Return the mean over rows of the square of the gradient of the row's loss, for every weight."""
    weights = list(model.parameters())
    total = [torch.zeros_like(one) for one in weights]
    for one in examples:
        batch = on_device(collate([one], pad), weights[0].device)
        gradients = torch.autograd.grad(retain_loss(logits_of(model, batch), batch["labels"]), weights)
        for place, gradient in zip(total, gradients, strict=True):
            place.addcmul_(gradient, gradient, value=1 / len(examples))
    return total


# --- shared -----------------------------------------------------------------------------------------------------------


def _train(world: World, weights: Iterable[Tensor], loss: Loss, steps: Steps, rate: float) -> None:
    """Take AdamW steps on the batches that a run sees, the learning rate rising and falling as in a run."""
    settings = world.settings
    batches = PairedBatches(
        world.inputs.examples["taught"],
        world.inputs.examples["forget"],
        retain_batch_size=settings.retain_batch_size,
        forget_batch_size=settings.forget_batch_size,
        pad_token_id=pad_token_id(world.inputs.tokenizer),
        seed=settings.seed,
        steps=range(steps.end),
    )
    trained, falling = list(weights), steps.end - steps.main
    rates = [rate * learning_rate_factor(step, steps.warmup, steps.main, falling) for step in range(steps.end)]

    def loss_of(step: int) -> Tensor:
        return loss({name: on_device(batch, trained[0].device) for name, batch in batches[step].items()})

    take_steps(trained, loss_of, rates, settings.max_gradient_norm)


def _write(model: Any, world: World, folder: Path) -> None:
    groups = find_groups(model, model.config)
    export_model(model, world.inputs.tokenizer, groups, full_mask(groups), folder / "model")
