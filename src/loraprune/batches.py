"""Batches: which rows of each set a training step sees; a function of the seed and the step alone.

Reads    tokenised sets
Gives    PairedBatches, score_sample
Source   -
Symbols  b rows of a batch
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

from loraprune.data import Example, collate

GROUPED_BATCHES = 50  # that are sorted by length together


@dataclass(frozen=True)
class _Stream:
    """One set's endless shuffle: in every epoch each example once; a batch is the whole set where that is smaller."""

    name: str
    examples: Sequence[Example]
    batch_size: int
    seed: int
    by_length: bool = False
    orders: dict[int, list[int]] = field(default_factory=dict, compare=False)  # of the last epochs, where grouped

    @property
    def size(self) -> int:
        return min(self.batch_size, len(self.examples))

    def rows(self, step: int) -> list[int]:
        return [self._index(position) for position in range(step * self.size, (step + 1) * self.size)]

    def batch(self, step: int, pad_token_id: int) -> dict[str, Tensor]:
        rows = self.rows(step)
        return {**collate([self.examples[row] for row in rows], pad_token_id), "rows": torch.tensor(rows)}

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.examples))
        return self._grouped(epoch)[place] if self.by_length else self._shuffled(epoch)[place]

    def _shuffled(self, epoch: int) -> list[int]:
        return _permutation(len(self.examples), f"{self.seed}/{self.name}/{epoch}")

    def _grouped(self, epoch: int) -> list[int]:
        """Return the epoch's order with rows of like length in one batch, which may begin in the epoch before."""
        if epoch not in self.orders:
            if len(self.orders) > 1:
                self.orders.clear()
            count, size = len(self.examples), self.size
            begun = -epoch * count % size  # rows that complete the batch that the epoch before began
            lengths = [len(one.input_ids) for one in self.examples]
            self.orders[epoch] = _group_by_length(
                self._shuffled(epoch), lengths, size, begun, f"{self.seed}/{self.name}/{epoch}/groups"
            )
        return self.orders[epoch]


@lru_cache(maxsize=8)
def _permutation(count: int, key: str) -> list[int]:
    return random.Random(key).sample(range(count), count)


def _group_by_length(order: Sequence[int], lengths: Sequence[int], size: int, begun: int, key: str) -> list[int]:
    """Return the order rearranged: within each 50 batches rows stand by length, and the batches are shuffled.

    The first `begun` rows and those that fill no whole batch stay where they are.
    """
    end = begun + (len(order) - begun) // size * size
    batches: list[Sequence[int]] = []
    for first in range(begun, end, size * GROUPED_BATCHES):
        rows = sorted(order[first : min(first + size * GROUPED_BATCHES, end)], key=lengths.__getitem__)
        batches += [rows[place : place + size] for place in range(0, len(rows), size)]
    random.Random(key).shuffle(batches)
    return [*order[:begun], *(row for batch in batches for row in batch), *order[end:]]


class PairedBatches(Dataset[dict[str, dict[str, Tensor]]]):
    """An item, a step's, is {"retain": batch, "forget": batch, "already_forgotten": batch}, without those not there.

    A batch is what `collate` gives, and `rows`, (b,): where its examples stand in their set.
    Each set has its own batch size and its own seeded, endless shuffle; a step's item depends on (seed, step) alone, so
    a resumed run sees the same data. To be read in order: a sampler that shuffles would shuffle twice.
    """

    def __init__(
        self,
        retain: Sequence[Example],
        forget: Sequence[Example] | None,
        already_forgotten: Sequence[Example] = (),
        *,
        retain_batch_size: int,
        forget_batch_size: int,
        pad_token_id: int,
        seed: int,
        steps: range,
        group_by_length: bool = False,
    ) -> None:
        self.streams = [_Stream("retain", retain, retain_batch_size, seed, group_by_length)]
        if forget:
            self.streams.append(_Stream("forget", forget, forget_batch_size, seed, group_by_length))
        if already_forgotten:
            held = _Stream("already_forgotten", already_forgotten, forget_batch_size, seed, group_by_length)
            self.streams.append(held)
        self.pad_token_id, self.steps = pad_token_id, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> dict[str, dict[str, Tensor]]:
        return {stream.name: stream.batch(self.steps[index], self.pad_token_id) for stream in self.streams}


def score_sample(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Return the same sample at every pruning step, so that scores differ by the model alone."""
    if len(examples) <= count:
        return list(examples)
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:count]
    return [examples[index] for index in sorted(chosen.tolist())]
