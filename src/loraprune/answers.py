"""Answers: one teacher-forced pass over a set, from which every teacher-forced number of its rows follows.

Reads    a model and tokenised examples; a model of a text alone has all its tokens as answer
Gives    answer_batches, read_answers, AnswerTokens, candidate_losses
Source   open-unlearning, arXiv 2506.12618, for what the last token, the end of sequence, counts in
Symbols  b rows of a batch, t tokens of an answer, n answer tokens of a batch, V vocabulary, p a token's probability
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loraprune import metrics
from loraprune.data import NO_LABEL, Example, batches_by_length, collate, on_device
from loraprune.objectives import logits_of
from loraprune.records import Compat

Numbers = NDArray[np.float64]  # (t,)
Verdicts = NDArray[np.bool_]  # (t,)
Advance = Callable[[int], object]  # told how many rows are done

NUMBERS_AT_ONCE = {"cpu": 2**18, "other": 2**27}  # logits worked on together; on a CPU what its cache holds


def silent(rows: int) -> None:
    """Tell nobody how many rows are done."""


@dataclass(frozen=True)
class AnswerTokens:
    """What a model gives one row's answer, the right answer so far being given: arrays (t,), the end included.

    `means` and `variances` are of log p over the vocabulary under p itself; empty where they were not asked for.
    """

    log_probabilities: Numbers
    right: Verdicts  # the token is the argmax
    facts: Verdicts  # the token is a marked fact's
    means: Numbers
    variances: Numbers

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats, the end included."""
        return float(-self.log_probabilities.mean())

    @property
    def probability(self) -> float:
        return float(metrics.probability(self.loss))

    @property
    def exact(self) -> bool:
        return bool(self.right.all())

    @property
    def fact_loss(self) -> float:
        """Mean negative log-likelihood over the tokens of marked facts, in nats; NaN without any."""
        marked = self.log_probabilities[self.facts]
        return float(-marked.mean()) if marked.size else float("nan")

    @property
    def exact_memorization(self) -> float:
        return float(metrics.exact_memorization([self.right[:-1]])[0])

    @property
    def extraction_strength(self) -> float:
        return float(metrics.extraction_strength([self.right[:-1]])[0])

    @property
    def min_k(self) -> float:
        """Score of the attack, the end left out; NaN for an answer of the end alone."""
        return metrics.min_k(self.log_probabilities[:-1]) if self.right.size > 1 else float("nan")

    @property
    def min_k_plus_plus(self) -> float:
        """Score of the attack, the end left out; NaN for an answer of the end alone; needs means and variances."""
        if self.right.size < 2:
            return float("nan")
        return metrics.min_k_plus_plus(self.log_probabilities[:-1], self.means[:-1], self.variances[:-1])


@dataclass(frozen=True)
class AnswerBatch:
    """What a model gives a batch's answers; tensors (b, places), position i predicting token i + 1, 0 off the answers.

    `spread`, (2, b, places): mean and variance of log p over the vocabulary; None where it was not asked for.
    """

    rows: list[int]  # where the batch's examples stand in their set
    counted: Tensor  # which places are answers
    facts: Tensor
    log_probabilities: Tensor  # float32
    right: Tensor
    spread: Tensor | None


def read_answers(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    advance: Advance = silent,
    spread: bool = True,
    compat: Compat = "none",
) -> list[AnswerTokens]:
    """Return every row's answer tokens, in the order of `examples`.

    One pass in eval mode, batched by length; batch size and padding change nothing but the last digits of float32.
    `spread`: also means and variances over the vocabulary. `compat` "open-unlearning" hides every token from
    attention that equals the padding token, as that evaluation does (on Llama 3 the ends of the prompt's turns).
    """
    batches = batches_by_length(examples, batch_size)
    found: dict[int, AnswerTokens] = {}
    for batch in answer_batches(model, examples, batches, pad_token_id=pad_token_id, spread=spread, compat=compat):
        found |= zip(batch.rows, _rows_of(batch), strict=True)
        advance(len(batch.rows))
    return [found[index] for index in range(len(examples))]


def candidate_losses(model: nn.Module, candidates: Sequence[Sequence[Example]], **options: Any) -> list[Numbers]:
    """Return for every row the losses of its candidate answers, (k,) nats, the end included.

    `candidates`: a row's examples, one a candidate answer to the same prompt; `options` are those of `read_answers`.
    """
    everything = [one for row in candidates for one in row]
    losses = np.array([one.loss for one in read_answers(model, everything, spread=False, **options)])
    ends = list(accumulate(map(len, candidates)))
    return np.split(losses, ends[:-1]) if ends else []


@torch.no_grad()
def answer_batches(
    model: nn.Module,
    examples: Sequence[Example],
    batches: Iterable[list[int]],
    *,
    pad_token_id: int,
    spread: bool = False,
    compat: Compat = "none",
) -> Iterator[AnswerBatch]:
    """Give the values of batches, named by the places of their examples; in eval mode, the mode left as it was."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for rows in batches:
            batch = collate([examples[row] for row in rows], pad_token_id)
            if compat == "open-unlearning":
                batch["attention_mask"] = (batch["input_ids"] != pad_token_id).long()
            yield _read_batch(model, rows, on_device(batch, device), spread)
    finally:
        model.train(training)


def _read_batch(model: nn.Module, rows: list[int], batch: dict[str, Tensor], spread: bool) -> AnswerBatch:
    targets = batch["labels"][:, 1:]
    counted = targets != NO_LABEL
    with answers_only(model, counted):
        logits = logits_of(model, batch)[0]  # (n, V)
    numbers = _token_numbers(logits, targets[counted], spread)  # (2 or 4, n)
    places = torch.zeros(len(numbers), *counted.shape, device=counted.device)
    places[:, counted] = numbers
    return AnswerBatch(
        rows, counted, batch["facts"][:, 1:] & counted, places[0], places[1].bool(), places[2:] if spread else None
    )


@contextmanager
def answers_only(model: Any, counted: Tensor) -> Iterator[None]:
    """Have the model compute logits where answers are predicted alone: of shape (1, n, V) inside this block.

    The last layer's states are chosen in front of the output projection, which for a large vocabulary is most of the
    memory and a good part of the time; each row of its product is what it would be in the whole.
    """

    def choose(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0][:, :-1][counted][None], *given[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def _token_numbers(logits: Tensor, targets: Tensor, spread: bool) -> Tensor:
    """Return log p, whether it is the argmax, and with `spread` mean and variance, of each answer token: float32."""
    allowed = NUMBERS_AT_ONCE["cpu" if logits.device.type == "cpu" else "other"]
    size = max(1, allowed // logits.shape[-1])
    parts = zip(logits.split(size), targets.split(size), strict=True)
    return torch.cat([_part_numbers(one.float(), those, spread) for one, those in parts], dim=1)


def _part_numbers(logits: Tensor, targets: Tensor, spread: bool) -> Tensor:
    chosen, total = logits.gather(-1, targets[:, None])[:, 0], logits.logsumexp(-1)
    numbers = [chosen - total, (logits.argmax(-1) == targets).float()]
    return torch.stack([*numbers, *_spread(logits, total)] if spread else numbers)


def _spread(logits: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of log p under p, each (n,), from the logits' logsumexp; log p is written over them."""
    probabilities = logits.softmax(-1)
    values = logits.sub_(total[:, None])
    means = torch.linalg.vecdot(probabilities, values)
    values.sub_(means[:, None])  # centred before it is squared: float32 loses nothing
    return means, torch.linalg.vecdot(probabilities, values.square_())


def _rows_of(batch: AnswerBatch) -> Iterator[AnswerTokens]:
    """Give each row's values as arrays of its own answer tokens."""
    counted = batch.counted.cpu().numpy()
    facts, right = batch.facts.cpu().numpy(), batch.right.cpu().numpy()
    values = batch.log_probabilities.double().cpu().numpy()
    spread = None if batch.spread is None else batch.spread.double().cpu().numpy()
    for row, places in enumerate(counted):
        means, variances = (np.empty(0), np.empty(0)) if spread is None else spread[:, row, places]
        yield AnswerTokens(values[row, places], right[row, places], facts[row, places], means, variances)
