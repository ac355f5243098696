"""Membership: can it be told from a model which rows it was trained on?

Reads    a model and examples; each row's scores on both sides, members (the forget set) and others (the holdout)
Gives    gradient_norms, Attack, attack, leakage
Source   arXiv 2402.07841 for the attacks; MUSE, arXiv 2407.06460, for privleak
Symbols  AUC of a score that is low for members; facts: rows with the same number are resampled together
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from loraprune.answers import Advance, silent
from loraprune.data import NO_LABEL, Example, collate, on_device
from loraprune.interval import auc_interval
from loraprune.metrics import membership_auc, privleak
from loraprune.objectives import logits_of, retain_loss
from loraprune.records import Compat, Interval


def gradient_norms(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    advance: Advance = silent,
    compat: Compat = "none",
) -> list[float]:
    """Return for every row the mean over parameter tensors of the 2-norm of the gradient of its loss, the end left out.

    One row at a time, in eval mode; gradients are handed over, never kept in the parameters. NaN for an answer of its
    end alone. differs: open-unlearning switches dropout on for this attack; here nothing is random.
    """
    training = model.training
    model.eval()
    norms = []
    for one in examples:
        norms.append(_gradient_norm(model, one, pad_token_id, compat))
        advance(1)
    model.train(training)
    return norms


def _gradient_norm(model: nn.Module, example: Example, pad_token_id: int, compat: Compat) -> float:
    batch = on_device(collate([example], pad_token_id), next(model.parameters()).device)
    labels = _without_end(batch["labels"])
    if (labels == NO_LABEL).all():
        return float("nan")
    mask = batch["input_ids"] != pad_token_id if compat == "open-unlearning" else batch["attention_mask"]
    logits = logits_of(model, {**batch, "attention_mask": mask.long()})
    trained = [one for one in model.parameters() if one.requires_grad]
    gradients = torch.autograd.grad(retain_loss(logits, labels), trained, allow_unused=True)
    norms = [torch.linalg.vector_norm(one, dtype=torch.float32) for one in gradients if one is not None]
    return float(torch.stack(norms).mean())


def _without_end(labels: Tensor) -> Tensor:
    """Return a single row's labels, (1, t), without the last one."""
    last = int((labels[0] != NO_LABEL).nonzero().max())
    return labels.index_fill(1, torch.tensor([last], device=labels.device), NO_LABEL)


@dataclass(frozen=True)
class Side:
    """One side's rows: a score each, low for members, and the fact that each is of."""

    scores: Sequence[float]
    facts: Sequence[int]

    def finite(self) -> "Side":
        """Return the side without rows that have no score."""
        return _scored([self])[0]


@dataclass(frozen=True)
class Attack:
    """What an attack, or the leakage that follows from one, came to on so many rows of each side."""

    value: float
    interval: Interval | None
    members: int
    others: int


def attack(members: Side, others: Side) -> Attack | None:
    """Return an attack's AUC in [0, 1], 0.5 being a guess; None where a side has no row with a score."""
    members, others = members.finite(), others.finite()
    if not members.scores or not others.scores:
        return None
    interval = auc_interval([(members.scores, others.scores)], members.facts, others.facts)
    auc = membership_auc(members.scores, others.scores)
    return Attack(auc, interval, len(members.scores), len(others.scores))


def leakage(sides: tuple[Side, Side], reference: tuple[Side, Side] | None) -> Attack | None:
    """Return privleak, in percent of the reference's 1 - AUC, from the members' and the others' scores of both models.

    Without a reference it is measured against guessing, an AUC of 0.5.
    """
    pairs = [sides] if reference is None else [sides, reference]
    kept = [_scored([pair[side] for pair in pairs]) for side in (0, 1)]
    if not kept[0][0].scores or not kept[1][0].scores:
        return None
    scores = [(members.scores, others.scores) for members, others in zip(*kept, strict=True)]
    interval: Any = auc_interval(scores, kept[0][0].facts, kept[1][0].facts, privleak)
    value = privleak(*(membership_auc(*pair) for pair in scores))
    return Attack(value, interval, len(kept[0][0].scores), len(kept[1][0].scores))


def _scored(models: Sequence[Side]) -> list[Side]:
    """Return one side's rows that have a score under all models."""
    kept = [row for row, scores in enumerate(zip(*(one.scores for one in models), strict=True)) if _all_finite(scores)]
    return [Side([one.scores[row] for row in kept], [one.facts[row] for row in kept]) for one in models]


def _all_finite(scores: Sequence[float]) -> bool:
    return all(map(isfinite, scores))
