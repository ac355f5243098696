"""Objectives: what is made small on the retain set, and what pushes the forget set down.

Reads    logits, (batch, length, vocabulary), and labels, (batch, length) with -100 where nothing is asked
Gives    per-row sums and means over answer tokens; retain and forget losses
Source   NPO, arXiv 2404.05868, eq. 3; SimNPO, arXiv 2410.07163, eq. 4; gradient ascent (ga)
Symbols  counted = which tokens are answers, (batch, length - 1): position t predicts token t + 1
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

IGNORED = -100


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch length vocabulary"]:
    """Return a model's logits for a batch; no cache is kept, since nothing is generated."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def _answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 logits and labels of the answer tokens alone, (n, vocabulary) and (n,), and where they are."""
    shifted = labels[:, 1:]
    counted = shifted != IGNORED
    return logits[:, :-1][counted].float(), shifted[counted], counted


def _back(values: Float[Tensor, " n"], counted: Bool[Tensor, "batch places"]) -> Float[Tensor, "batch places"]:
    """Return the answer tokens' values at their places, 0 elsewhere."""
    return torch.zeros(counted.shape, device=values.device).masked_scatter(counted, values)


def answer_log_probabilities(
    logits: Float[Tensor, "batch length vocabulary"], labels: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "batch length-1"], Bool[Tensor, "batch length-1"]]:
    """Return log p of every answer token, in float32, and where they are."""
    answers, targets, counted = _answers(logits, labels)
    chosen = answers.gather(-1, targets[:, None])[:, 0]
    return _back(chosen - answers.logsumexp(-1), counted), counted


def answer_log_odds(
    logits: Float[Tensor, "batch length vocabulary"], labels: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "batch length-1"], Bool[Tensor, "batch length-1"]]:
    """Return z_y - logsumexp(other logits) of every answer token, in float32, and where they are.

    differs: not log p - log(1 - p), which is infinite once p rounds to 1.
    """
    answers, targets, counted = _answers(logits, labels)
    chosen = answers.gather(-1, targets[:, None])[:, 0]
    others = answers.scatter(-1, targets[:, None], -torch.inf).logsumexp(-1)
    return _back(chosen - others, counted), counted


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


def part_of_forget_loss(kind: str, tokens: Tensor, all_tokens: Tensor) -> float:
    """Return what the loss of some rows weighs in that of the whole batch: npo weighs tokens, the others rows."""
    part, whole = (tokens.sum(), all_tokens.sum()) if kind == "npo" else (len(tokens), len(all_tokens))
    return float(part / whole)


def forget_loss(
    kind: str,
    row_log_probability: Tensor,
    tokens: Tensor,
    base_log_probability: Tensor,
    beta: float,
    weights: Tensor | float = 1.0,
) -> Tensor:
    """Return the mean over rows, for npo over their tokens, of a loss that falls as the answers become unlikely.

    `row_log_probability` and `base_log_probability`, (batch,): log p of the whole answer now and under the untouched
    model; `tokens`, (batch,): the answer's length; `weights`: of the rows' losses, one for all or (batch,). ga is
    unbounded below; npo and simnpo flatten out.
    differs: npo's ratio is that of the mean token, and a row weighs as its tokens do; by whole answers, as published,
    a long one flattens out long before a short one.
    """
    if kind == "ga":
        return (weights * row_log_probability / tokens).mean()
    if kind == "npo":
        losses = -(2.0 / beta) * tokens * logsigmoid(-beta * (row_log_probability - base_log_probability) / tokens)
        return (weights * losses).mean() / tokens.float().mean()
    if kind == "simnpo":
        return -(2.0 / beta) * (weights * logsigmoid(-beta * row_log_probability / tokens)).mean()
    raise ValueError(f"forget loss {kind!r} is not one of ga, npo, simnpo")
