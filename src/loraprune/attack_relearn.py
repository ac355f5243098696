"""Attack by training: is what was forgotten learnt again faster than by a model that never knew it?

Reads    a model, rows to train on, other rows to score
Gives    relearn, retrain
Source   relearning a half and asking for the other, arXiv 2410.08827; that a little training suffices, 2401.01814
Symbols  -
"""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any, Literal

import numpy as np
import torch

from loraprune.answers import AnswerTokens
from loraprune.attacked import MEASURES, AttackedModel, AttackResult, NotRun, Reading, Values, interval_of
from loraprune.batches import PairedBatches
from loraprune.data import Row, find_facts, on_device
from loraprune.metrics import mean_over_steps
from loraprune.model import attach_lora
from loraprune.objectives import logits_of, retain_loss
from loraprune.progress import Advance
from loraprune.settings import Settings

Weights = Literal["all", "lora"]
LOOKS = (1, 2, 5)  # and these times 10, 100, ...: where a curve is looked at
FULL_RATE = 0.1  # of the adapters' learning rate, for all weights; at the whole rate they forget what they knew
SCORED = 64  # rows of what was trained on that are asked at the end, to tell whether the training took


def looks(steps: int) -> list[int]:
    """Return the steps after which a model is scored: 0, 1, 2, 5, 10, 20, 50 ... and the last one."""
    tens = range(len(str(steps)))
    return sorted({0, steps, *(one * 10**ten for ten in tens for one in LOOKS if one * 10**ten < steps)})


def relearn(attacked: AttackedModel, advance: Advance, weights: Weights) -> AttackResult:
    """Train on one half of the forget set and ask for the other, which cannot be inferred from the first."""
    rows = attacked.rows
    if not rows.hidden:
        raise NotRun("the forget set is of one fact or one subject: no half is left that the training has not shown")
    return _train_and_ask(attacked, advance, weights, rows.shown, rows.hidden, attacked.settings.forget_batch_size)


def retrain(attacked: AttackedModel, advance: Advance, weights: Weights) -> AttackResult:
    """Train on the taught rows of the retain set alone and ask for the forget set."""
    rows = attacked.rows
    return _train_and_ask(attacked, advance, weights, rows.taught, rows.forget, attacked.settings.retain_batch_size)


def _train_and_ask(
    attacked: AttackedModel,
    advance: Advance,
    weights: Weights,
    trained: Sequence[Row],
    asked: Sequence[Row],
    batch_size: int,
) -> AttackResult:
    steps = attacked.settings.attack_steps
    advance(0, new_total=steps)
    model = _trainable(attacked, weights)
    curve, step = {0: attacked.answers(model, asked)}, 0
    for step in _train(model, attacked, trained, batch_size, learning_rate(attacked.settings, weights)):
        advance(1)
        if step in looks(steps):
            if not _is_finite(answers := attacked.answers(model, asked)):
                break
            curve[step] = answers
    took = attacked.answers(model, trained[:SCORED])
    details: Values = {
        "curve": _curve_values(curve, asked),
        "steps_taken": step,
        "trained_rows": len(trained),
        "trained_performance": _mean(took, "probability") if _is_finite(took) else None,
    }
    return AttackResult(_readings(curve, asked), details)


def _is_finite(answers: Sequence[AnswerTokens]) -> bool:
    """Say whether the model still gives numbers: too high a learning rate destroys it."""
    return all(isfinite(one.loss) for one in answers)


def _mean(answers: Sequence[AnswerTokens], own: str) -> float:
    return float(np.mean([getattr(one, own) for one in answers]))


def _trainable(attacked: AttackedModel, weights: Weights) -> Any:
    """Return the model with all weights to train, in float32 (a bfloat16 loses small updates), or adapters alone."""
    model = attacked.load()
    return attach_lora(model, attacked.settings) if weights == "lora" else model.float()


def _train(model: Any, attacked: AttackedModel, rows: Sequence[Row], batch_size: int, rate: float) -> Iterator[int]:
    """Take the steps, giving the number of each once it is taken; end early where the loss is not finite."""
    settings, device = attacked.settings, next(model.parameters()).device
    torch.manual_seed(settings.seed)
    batches = _batches(attacked, rows, batch_size)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for step in range(len(batches)):
        batch = on_device(batches[step]["retain"], device)
        model.train()
        loss = retain_loss(logits_of(model, batch), batch["labels"])
        if not isfinite(loss.item()):
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


def learning_rate(settings: Settings, weights: Weights) -> float:
    """Return the rate that is set, else the run's own for adapters and a tenth of it for all weights, as is usual."""
    if settings.attack_learning_rate is not None:
        return settings.attack_learning_rate
    return settings.learning_rate * (1.0 if weights == "lora" else FULL_RATE)


def _batches(attacked: AttackedModel, rows: Sequence[Row], batch_size: int) -> PairedBatches:
    """Return the batches of the attack: the seed alone decides which rows come when, the same for every model."""
    settings = attacked.settings
    return PairedBatches(
        attacked.examples(rows),
        None,
        retain_batch_size=batch_size,
        forget_batch_size=batch_size,
        pad_token_id=attacked.pad_token_id,
        seed=settings.seed,
        steps=range(settings.attack_steps),
    )


def _readings(curve: dict[int, list[AnswerTokens]], rows: Sequence[Row]) -> dict[str, Reading]:
    """Return each measure at step 0, at the step where it is highest, and over all steps."""
    readings, steps = {}, list(curve)
    for name, own in MEASURES.items():
        heights = np.array([[getattr(one, own) for one in answers] for answers in curve.values()])  # (looks, n)
        best = heights[int(heights.mean(1).argmax())]
        readings[name] = Reading(find_facts(rows), heights[0], best, mean_over_steps(steps, heights).tolist())
    return readings


def _curve_values(curve: dict[int, list[AnswerTokens]], rows: Sequence[Row]) -> list[Values]:
    facts, points = find_facts(rows), []
    for step, answers in curve.items():
        point: Values = {"step": step}
        for name, own in MEASURES.items():
            values = [getattr(one, own) for one in answers]
            point |= {name: _mean(answers, own), f"{name}_interval": interval_of(values, facts)}
        points.append(point)
    return points
