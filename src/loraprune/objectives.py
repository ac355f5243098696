"""Objectives: what is made small on the retain set, and what pushes the forget set down.

Reads    logits, (batch, length, vocabulary), and labels, (batch, length) with -100 where nothing is asked
Gives    per-row sums and means over answer tokens; retain and forget losses
Source   NPO, arXiv 2404.05868, eq. 3; SimNPO, arXiv 2410.07163, eq. 4; gradient ascent (ga)
Symbols  counted = which tokens are answers, (batch, length - 1): position t predicts token t + 1
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

IGNORED = -100


def _targets(labels: Int[Tensor, "batch length"]) -> tuple[Tensor, Tensor]:
    shifted = labels[:, 1:]
    counted = shifted != IGNORED
    return shifted.masked_fill(~counted, 0), counted


def answer_log_probabilities(
    logits: Float[Tensor, "batch length vocabulary"], labels: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "batch length-1"], Bool[Tensor, "batch length-1"]]:
    """Return log p of every answer token, in float32, and where they are."""
    targets, counted = _targets(labels)
    logits = logits[:, :-1].float()
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    return chosen - logits.logsumexp(-1), counted


def answer_log_odds(
    logits: Float[Tensor, "batch length vocabulary"], labels: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "batch length-1"], Bool[Tensor, "batch length-1"]]:
    """Return z_y - logsumexp(other logits) of every answer token, in float32, and where they are.

    differs: not log p - log(1 - p), which is infinite once p rounds to 1.
    """
    targets, counted = _targets(labels)
    logits = logits[:, :-1].float()
    chosen = logits.gather(-1, targets[..., None])
    others = logits.scatter(-1, targets[..., None], -torch.inf).logsumexp(-1)
    return chosen[..., 0] - others, counted


def row_sums(values: Tensor, counted: Tensor) -> Float[Tensor, " batch"]:
    """Return each row's sum over its answer tokens."""
    return torch.where(counted, values, 0.0).sum(1)


def row_means(values: Tensor, counted: Tensor) -> Float[Tensor, " batch"]:
    """Return each row's mean over its answer tokens."""
    return row_sums(values, counted) / counted.sum(1)


def retain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log-likelihood over all answer tokens of the batch."""
    values, counted = answer_log_probabilities(logits, labels)
    return -row_sums(values, counted).sum() / counted.sum()


def forget_loss(
    kind: str, row_log_probability: Tensor, tokens: Tensor, base_log_probability: Tensor, beta: float
) -> Tensor:
    """Return the mean over rows of a loss that falls as the answers become unlikely.

    `row_log_probability` and `base_log_probability`, (batch,): log p of the whole answer now and under the untouched
    model; `tokens`, (batch,): the answer's length. ga is unbounded below; npo and simnpo flatten out.
    """
    if kind == "ga":
        return (row_log_probability / tokens).mean()
    if kind == "npo":
        return -(2.0 / beta) * logsigmoid(-beta * (row_log_probability - base_log_probability)).mean()
    if kind == "simnpo":
        return -(2.0 / beta) * logsigmoid(-beta * row_log_probability / tokens).mean()
    raise ValueError(f"forget loss {kind!r} is not one of ga, npo, simnpo")
