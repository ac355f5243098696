"""Balance: how hard each set is pulled at a training step, and the loss that comes of it.

Reads    a batch of each set, the model, where its rows' P stand between their beginning and their goals
Gives    TrainingSets, Balance
Source   that the forget loss is taken where relearning would lead: arXiv 2502.05374; differs: where relearning of other
         rows would; see relearning.py
Symbols  P = performance; rest = where P of an earlier request's set is held, high = its ceiling
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from loraprune.data import Example
from loraprune.evaluate import answer_values
from loraprune.mask import LiveMask
from loraprune.objectives import (
    IGNORED,
    answer_log_probabilities,
    forget_loss,
    logits_of,
    part_of_forget_loss,
    retain_loss,
    row_sums,
)
from loraprune.processes import collected, dealt, rows_each
from loraprune.records import DatasetType
from loraprune.relearning import gradients_of, moved
from loraprune.settings import Settings
from loraprune.steering import Steering

Item = TypeVar("Item")
Weigh = Callable[[Tensor, Tensor], Tensor]  # gives the weights of a batch's rows, from their numbers and their P


def joined(sequences: Iterable[Sequence[Item]]) -> list[Item]:
    """Return the items of all sequences in order."""
    return [item for one in sequences for item in one]


@dataclass(frozen=True)
class TrainingSets:
    """The tokenised sets that a run trains on; no forget set means plain compression."""

    taught: Sequence[Example]
    forget: Sequence[Example] | None
    pad_token_id: int
    already_forgotten: tuple[Sequence[Example], ...] = ()  # a set for each earlier request

    def scored(self) -> list[tuple[DatasetType, Sequence[Example]]]:
        """Return the sets whose sensitivities decide."""
        sets: list[tuple[DatasetType, Sequence[Example]]] = [("retain", self.taught)]
        return sets if self.forget is None else [*sets, ("forget", self.forget)]


class Balance:
    """The loss of a step: retain + ratio x forget, the forget part fading as P of a row nears its goal.

    What is below its goal is pulled up to it: that less was known shows an observer what was removed. With
    `relearning_radius` the forget loss of each half of a batch is taken not where the adapters are but where relearning
    the other half would bring them, so that what is forgotten does not come back with what is learnt beside it; how
    hard it pushes is decided by P of the adapters as they are. Sets of earlier requests are pushed down as soon as
    they rise above where they rest, also while the forget set itself is left alone, and where the adapters are.
    """

    def __init__(
        self, model: PeftModel, settings: Settings, sets: TrainingSets, live: LiveMask, steering: Steering
    ) -> None:
        self.settings, self.sets, self.steering = settings, sets, steering
        self.untouched = self.untouched_log_probability(model, live)
        self.radius = settings.relearning_radius * settings.learning_rate

    def untouched_log_probability(self, model: PeftModel, live: LiveMask) -> dict[str, Tensor]:
        """Return log p of every answer that is pushed down under the model to start from: adapters off, mask off."""
        pushed = {"forget": self.sets.forget or (), "already_forgotten": joined(self.sets.already_forgotten)}
        size: dict[str, Any] = {"batch_size": self.settings.evaluate_batch_size, "pad_token_id": self.sets.pad_token_id}
        with live.lifted(), model.disable_adapter():
            return {
                name: answer_values(model, examples, **size).log_probability.float()
                for name, examples in pushed.items()
                if examples
            }

    def loss(
        self, model: nn.Module, inputs: Mapping[str, Any], *, forgetting: bool, forget_weight: float
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch of each set, and the retain batch's logits.

        `forget_weight`, in (0, 1]: what is left of the forget loss after steps undone because training broke a limit.
        """
        loss, logits = torch.zeros(()), torch.zeros(())
        if (batch := inputs.get("retain")) is not None:
            logits = logits_of(model, batch)
            loss = retain_loss(logits, batch["labels"])
        for name, weigh in self._weighers(forgetting, forget_weight).items():
            if name in inputs:
                pushed = self._pushed_down(model, inputs[name], self.untouched[name], weigh)
                loss = loss + self.settings.forget_retain_ratio * pushed
        return loss, logits

    def parts(
        self, model: nn.Module, inputs: Mapping[str, Any], size: int | None, *, forgetting: bool, forget_weight: float
    ) -> Iterator["Part"]:
        """Yield parts of at most `size` rows of one set, whose losses add up to `loss` of the whole batch.

        Over all processes, that is, which get as many parts each. A loss is to be taken back before the next one, so
        that one graph is alive at a time. How hard a set is pushed down depends on its whole batch, which is read
        first. The forget loss differs from that of `loss` where it looks ahead.
        """
        batch = inputs["retain"]
        for part, weight in dealt(split_batch(batch, size)):
            yield Part(len(part["rows"]), partial(self._kept_part, model, part, batch, weight))
        for name, weigh in self._weighers(forgetting, forget_weight).items():
            if name in inputs:
                ahead = name == "forget" and self.looks_ahead(forgetting)
                pushed = self._withstood_parts if ahead else self._pushed_parts
                yield from pushed(model, inputs[name], self.untouched[name], weigh, size)

    @staticmethod
    def _kept_part(model: nn.Module, part: Mapping[str, Tensor], whole: Mapping[str, Tensor], weight: float) -> Tensor:
        share = weight * answer_tokens(part).sum() / answer_tokens(whole).sum()
        return share * retain_loss(logits_of(model, part), part["labels"])

    def looks_ahead(self, forgetting: bool) -> bool:
        """Say whether a step takes its forget loss from moved adapters: then it goes by parts, whatever their size."""
        return bool(self.radius) and self.sets.forget is not None and "forget" in self._weighers(forgetting, 1.0)

    def _pushed_parts(
        self, model: nn.Module, batch: Mapping[str, Tensor], untouched: Tensor, weigh: Weigh, size: int | None
    ) -> Iterator["Part"]:
        parts = split_batch(batch, size)
        weights = weigh(batch["rows"], self._read(model, parts).exp())
        yield from self._weighted_parts(model, batch, parts, untouched, weights)

    def _withstood_parts(
        self, model: nn.Module, batch: Mapping[str, Tensor], untouched: Tensor, weigh: Weigh, size: int | None
    ) -> Iterator["Part"]:
        """Yield the parts of the loss, each half of the batch where relearning the other half leads the adapters.

        They are moved back after each half. A row that is alone in its batch stands for both halves.
        """
        halves = [split_batch(half, size) for half in halves_of(batch)]
        own: list[list[Tensor]] = [[] for _ in halves]

        def likely(into: list[Tensor], part: Mapping[str, Tensor], counts: float) -> Tensor:
            rows, tokens = self._rows_of(model, part)
            into.append((rows.detach() / tokens).cpu())
            return counts * (rows / tokens).sum()

        gradients = [
            gradients_of(model, [partial(likely, into, *one) for one in dealt(parts)])
            for into, parts in zip(own, halves, strict=True)
        ]
        read = [torch.cat(collected(into, len(parts))) for into, parts in zip(own, halves, strict=True)]
        weights = weigh(batch["rows"], torch.cat(read).exp()).split([len(one) for one in read])
        for number, (parts, weights_of_half) in enumerate(zip(halves, weights, strict=True)):
            other = len(halves) - 1 - number
            teaches = partial(self._is_likelier, model, halves[other], read[other])
            with moved(model, gradients[other], self.radius, teaches) if weights_of_half.any() else nullcontext():
                yield from self._weighted_parts(model, batch, parts, untouched, weights_of_half)

    def _is_likelier(self, model: nn.Module, parts: Sequence[Mapping[str, Tensor]], before: Tensor) -> bool:
        """Say whether rows are likelier than they were, by the mean of log P."""
        return bool(self._read(model, parts).mean() > before.mean())

    @torch.no_grad()
    def _read(self, model: nn.Module, parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return log P of the rows of all parts, in order, on the CPU; every process reads some parts."""
        own = []
        for part, _ in dealt(parts):
            rows, tokens = self._rows_of(model, part)
            own.append((rows / tokens).cpu())
        return torch.cat(collected(own, len(parts)))

    def _weighted_parts(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        parts: Sequence[Mapping[str, Tensor]],
        untouched: Tensor,
        weights: Tensor,
    ) -> Iterator["Part"]:
        own = weights.split([len(one["rows"]) for one in parts])
        weighted = list(zip(parts, own, strict=True)) if weights.any() else []
        for (part, weights_of_part), counts in dealt(weighted):
            of_batch = part_of_forget_loss(self.settings.forget_loss, answer_tokens(part), answer_tokens(batch))
            share = weights_of_part * counts * self.settings.forget_retain_ratio * of_batch
            yield Part(len(part["rows"]), partial(self._pushed_part, model, part, untouched, share))

    def _pushed_part(self, model: nn.Module, part: Mapping[str, Tensor], untouched: Tensor, weights: Tensor) -> Tensor:
        return self._forget_loss(*self._rows_of(model, part), untouched, part["rows"], weights)

    def _forget_loss(self, rows: Tensor, tokens: Tensor, untouched: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        base, weights = untouched.to(rows.device)[numbers], weights.to(rows.device)
        kind, beta = self.settings.forget_loss, self.settings.forget_loss_beta
        return forget_loss(kind, rows, tokens, base, beta, weights)

    def _weighers(self, forgetting: bool, forget_weight: float) -> dict[str, Weigh]:
        """Return what tells how hard each row of a set is pushed down at this step."""
        if not self.settings.pushes_down:
            return {}
        weighers: dict[str, Weigh] = {"already_forgotten": self._held_down}
        if forgetting:
            weighers["forget"] = lambda rows, performance: forget_weight * self.steering.ways_left(performance)
        return weighers

    def _held_down(self, rows: Tensor, performance: Tensor) -> Tensor:
        """Return the weight of a batch of earlier requests, for each row the same: 0 where they rest, 1 at ceilings."""
        counts = torch.tensor([len(one) for one in self.sets.already_forgotten])
        which = torch.arange(len(counts)).repeat_interleave(counts)[rows.cpu()]
        rest, high = (
            torch.tensor([getattr(one, name) for one in self.steering.ceilings])[which].mean()
            for name in ("rest", "high")
        )
        way = ((performance.mean().cpu() - rest) / (high - rest).clamp(min=1e-6)).clamp(0.0, 1.0)
        return torch.full_like(performance, float(way))

    def _pushed_down(self, model: nn.Module, batch: Mapping[str, Tensor], untouched: Tensor, weigh: Weigh) -> Tensor:
        rows, tokens = self._rows_of(model, batch)
        weights = weigh(batch["rows"], (rows.detach() / tokens).exp())
        if not weights.any():
            return rows.new_zeros(())
        return self._forget_loss(rows, tokens, untouched, batch["rows"], weights)

    @staticmethod
    def _rows_of(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return log p of every row's answer, and its length in tokens."""
        values, counted = answer_log_probabilities(logits_of(model, batch), batch["labels"])
        return row_sums(values, counted), counted.sum(1)


@dataclass(frozen=True)
class Part:
    """Some rows of one set in a training step; `loss` runs the model on them."""

    rows: int
    loss: Callable[[], Tensor]


def answer_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return how many tokens of each row are answers, (b,)."""
    return (batch["labels"][:, 1:] != IGNORED).sum(1)


def halves_of(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the first and the second half of a batch's rows; a single row is not divided."""
    sizes = half_sizes(len(batch["rows"]))
    return [
        dict(zip(batch, half, strict=True)) for half in zip(*(one.split(sizes) for one in batch.values()), strict=True)
    ]


def half_sizes(rows: int) -> list[int]:
    """Return how many rows each half of a batch has: one half where there is one row."""
    return [rows - rows // 2, rows // 2] if rows > 1 else [rows]


def split_batch(batch: Mapping[str, Tensor], most: int | None) -> list[dict[str, Tensor]]:
    """Return the batch in parts of at most `most` rows, one at least for every process, as wide as its longest row."""
    widths = batch["attention_mask"].sum(1)
    parts, size = [], rows_each(len(widths), most)
    for first in range(0, len(widths), size):
        rows = slice(first, first + size)
        width = int(widths[rows].max())
        parts.append({name: one[rows, :width] if one.ndim == 2 else one[rows] for name, one in batch.items()})
    return parts
