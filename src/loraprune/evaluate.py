"""Evaluate: what a model knows of a set, teacher-forced.

Reads    a model and tokenised examples
Gives    Measured: performance, loss, exact match and fact performance of a set; log p of every row
Source   probability as in TOFU, arXiv 2401.06121: exp(-mean negative log-likelihood of the answer, end included)
Symbols  P = mean over rows of exp(-mean over answer tokens of -log p)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraprune.answers import Advance, AnswerBatch, answer_batches, silent
from loraprune.data import Example, batches_by_length
from loraprune.interval import ratio_interval
from loraprune.objectives import row_means, row_sums
from loraprune.processes import collected, dealt
from loraprune.records import Interval


@dataclass(frozen=True)
class AnswerValues:
    """What the model gives each row's answer: all of shape (rows,)."""

    log_probability: Tensor  # log p of the whole answer
    tokens: Tensor  # length of the answer
    exact: Tensor  # every answer token is the argmax
    fact_log_probability: Tensor  # mean log p over the tokens of the marked facts; NaN without facts


@dataclass(frozen=True)
class Measured:
    """One set's numbers; performance, exact match and fact performance in [0, 1], loss in nats."""

    performance: float
    loss: float
    exact_match: float
    fact_performance: float | None
    row_performance: tuple[float, ...]

    @property
    def rows(self) -> int:
        return len(self.row_performance)

    def interval(self, facts: Sequence[int]) -> Interval | None:
        """Return the performance's 95% bootstrap interval; rows of one fact have the same number in `facts`."""
        return ratio_interval(self.row_performance, [1.0] * self.rows, facts)

    def as_values(self, facts: Sequence[int]) -> dict[str, Any]:
        """Return the numbers as files hold them: the interval is of so many facts."""
        names = ("performance", "loss", "exact_match", "fact_performance", "rows")
        values = {name: getattr(self, name) for name in names}
        return {**values, "facts": len(set(facts)), "performance_interval": self.interval(facts)}


def answer_values(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    advance: Advance = silent,
) -> AnswerValues:
    """Return every row's values, in the order of `examples`; runs in eval mode and leaves the mode as it was.

    Several processes read some batches each.
    """
    batches = batches_by_length(examples, batch_size)
    shares, own = dealt(batches), []
    for batch in answer_batches(model, examples, [rows for rows, _ in shares], pad_token_id=pad_token_id):
        own.append(_batch_values(batch))
        advance(len(batch.rows))
    if (others := len(examples) - sum(len(rows) for rows, _ in shares)) > 0:
        advance(others)  # what other processes read
    back = torch.tensor([row for rows in batches for row in rows]).argsort()
    parts = collected(own, len(batches))
    return AnswerValues(*(torch.cat(values)[back] for values in zip(*parts, strict=True)))


def _batch_values(batch: AnswerBatch) -> tuple[Tensor, ...]:
    values, counted = batch.log_probabilities, batch.counted
    exact = (batch.right | ~counted).all(1)
    return tuple(
        one.double().cpu() for one in (row_sums(values, counted), counted.sum(1), exact, row_means(values, batch.facts))
    )


def measure(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    advance: Advance = silent,
) -> Measured:
    """Return the set's numbers under the model as it is now, mask and adapters included."""
    return measured(answer_values(model, examples, batch_size=batch_size, pad_token_id=pad_token_id, advance=advance))


def measured(values: AnswerValues) -> Measured:
    """Return the set's numbers from its rows' values."""
    means = values.log_probability / values.tokens
    marked = values.fact_log_probability[~values.fact_log_probability.isnan()]
    return Measured(
        performance=float(means.exp().mean()),
        loss=float(-means.mean()),
        exact_match=float(values.exact.mean()),
        fact_performance=float(marked.exp().mean()) if len(marked) else None,
        row_performance=tuple(means.exp().tolist()),
    )
