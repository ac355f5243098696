"""Estimate: memory and time of every stage of a run, from small passes of the stages' own code on the run's own rows.

Reads    a live model with adapters, its trainer, the tokenised sets
Gives    Passes: the kinds of pass; Pass, Cost; StageMemory, stage_memory
Source   -
Symbols  a pass = evaluation without gradients, scoring, or one training step; the heaviest is that with most tokens
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from loraprune.balance import half_sizes
from loraprune.data import Example, batches_by_length, collate, on_device
from loraprune.evaluate import answer_values
from loraprune.memory import FEW, Footprint, Rows, affordable, fewer, footprint_of
from loraprune.objectives import IGNORED
from loraprune.records import DatasetType, Sensitivity
from loraprune.scoring import as_asked, score_model
from loraprune.settings import Settings
from loraprune.trainer import LoRAPruneTrainer

TRIAL_BYTES = 2**30  # what a pass may take that is run to measure time and what the allocator adds
MOMENTS = 2  # of AdamW, each of the adapters' size
POINT = 1 + MOMENTS  # what a point to roll back to holds, in sizes of the adapters
AHEAD = 3  # of the adapters' size too, where the forget loss looks ahead: where they are, what moves them for each half

Sets = Mapping[str, Sequence[Example]]


# --- passes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What passes of one kind take, in seconds: so much each, and so much a token, padding included."""

    each: float
    token: float

    def seconds(self, passes: Iterable[float]) -> float:
        """Return what passes of so many tokens take together."""
        return sum(self.each + self.token * tokens for tokens in passes)


@dataclass(frozen=True)
class Pass:
    """One kind of pass: how it is run on chosen rows, and the rows of the heaviest one, each set's longest first."""

    run: Callable[[Rows], object]
    heaviest: Rows
    widths: Mapping[str, int]  # tokens a row, padding included
    labels: Mapping[str, Mapping[int, int]]  # of each row: what it weighs beyond its tokens

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self.heaviest.items()}

    def footprint(self) -> Footprint:
        """Return what the pass takes, whatever the number of rows."""
        return footprint_of(self.run, self.heaviest, self.labels)

    def cost(self, counts: Mapping[str, int]) -> Cost:
        """Return the cost of passes of this kind, from one with few rows and one with `counts`, both warm."""
        few = {name: min(FEW, count) for name, count in counts.items()}
        short, long = self._seconds(few), self._seconds(counts)
        tokens, more = self._tokens(counts), self._tokens(counts) - self._tokens(few)
        token = min(max(0.0, (long - short) / more), long / tokens) if more else long / tokens
        return Cost(max(0.0, long - token * tokens), token)

    def _tokens(self, counts: Mapping[str, int]) -> int:
        return sum(count * self.widths[name] for name, count in counts.items())

    def _seconds(self, counts: Mapping[str, int]) -> float:
        rows = fewer(self.heaviest, counts, self.labels)
        self.run(rows)
        return seconds_of(lambda: self.run(rows))


def seconds_of(action: Callable[[], object]) -> float:
    """Return how long an action takes, on a GPU until it has done all of it."""
    begun = perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - begun


def pass_over(run: Callable[[str, list[Example]], object], sets: Sets, batch_size: int) -> Pass:
    """Return the pass that runs on the examples of one set at a time, at most `batch_size` of them, by length."""
    batches = [(name, rows) for name, one in sets.items() for rows in batches_by_length(one, batch_size)]
    name, rows = max(batches, key=lambda batch: _padded([sets[batch[0]][row] for row in batch[1]]))
    examples = sets[name]

    def run_rows(chosen: Rows) -> object:
        return run(name, [examples[row] for row in chosen[name]])

    return Pass(
        run_rows,
        {name: rows[::-1]},
        {name: len(examples[rows[-1]].input_ids)},
        {name: {row: sum(one != IGNORED for one in examples[row].labels) for row in rows}},
    )


def _padded(examples: Sequence[Example]) -> int:
    return len(examples) * max(len(one.input_ids) for one in examples)


def passes_over(examples: Sequence[Example], batch_size: int) -> list[int]:
    """Return the tokens of every pass over a set."""
    return [_padded([examples[row] for row in rows]) for rows in batches_by_length(examples, batch_size)]


def chosen_rows(batch: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Return some rows of a batch."""
    return {name: one[list(rows)] for name, one in batch.items()}


class Passes:
    """The kinds of pass that a run is made of, on a live model; each leaves adapters and mask as they are."""

    def __init__(self, settings: Settings, sets: Sets, trainer: LoRAPruneTrainer) -> None:
        self.settings, self.sets, self.trainer = settings, sets, trainer
        self.pad = trainer.sets.pad_token_id
        steps: Iterable[Any] = trainer.get_train_dataloader()
        self.step_tokens: list[dict[str, int]] = []
        self._heaviest_step: Mapping[str, Mapping[str, Tensor]] = {}
        for step in steps:
            self.step_tokens.append({name: batch["input_ids"].numel() for name, batch in step.items()})
            if sum(self.step_tokens[-1].values()) >= max(sum(one.values()) for one in self.step_tokens):
                self._heaviest_step = step

    def evaluation(self, names: Iterable[str], *, adapted: bool) -> Pass:
        """Return the pass that measures P on some of the sets, of the model with its adapters and mask or without."""
        model, live = self.trainer.adapted, self.trainer.live

        def run(name: str, examples: list[Example]) -> object:
            with ExitStack() as plain:
                if not adapted:
                    plain.enter_context(live.lifted())
                    plain.enter_context(model.disable_adapter())
                return answer_values(model, examples, batch_size=len(examples), pad_token_id=self.pad)

        return pass_over(run, {name: self.sets[name] for name in names}, self.settings.evaluate_batch_size)

    def scoring(self, sample: Mapping[DatasetType, Sequence[Example]]) -> Pass:
        """Return the pass that scores all groups on rows of the sample."""

        def run(name: str, examples: list[Example]) -> object:
            return self.score("forget" if name == "forget" else "retain", examples, len(examples))

        return pass_over(run, {**sample}, self.settings.evaluate_batch_size)

    def score(self, dataset_type: DatasetType, examples: Sequence[Example], batch_size: int) -> Sensitivity:
        """Return one set's sensitivities as the run computes them; the batch size changes nothing but memory."""
        parts = ([examples[row] for row in rows] for rows in batches_by_length(examples, batch_size))
        return score_model(
            self.trainer.adapted,
            self.trainer.live,
            [self._moved(collate(part, self.pad)) for part in parts],
            dataset_type,
            **as_asked(self.settings),
        )

    def training(self, *, scored: bool = False) -> Pass:
        """Return the training step's pass: the trainer's own loss, the graphs of all its sets alive together, and back.

        Where a step goes by parts a pass is of one set and so many rows. A scored one leaves what the metric reads of a
        step, which is then read.
        """
        step = {name: self._heaviest_step[name] for name in self.taken_back}
        most = self._rows_of_pass
        if most is not None:
            name = max(step, key=lambda one: step[one]["input_ids"][: most[one]].numel())
            step = {name: step[name]}

        def run(chosen: Rows) -> None:
            self._take_back({name: chosen_rows(step[name], rows) for name, rows in chosen.items()}, scored=scored)
            if scored:
                self._read_score()
            self._forget_gradients()

        order = {
            name: batch["attention_mask"].sum(1).argsort(descending=True).tolist()[: most[name] if most else None]
            for name, batch in step.items()
        }
        labels = {name: (batch["labels"] != IGNORED).sum(1).tolist() for name, batch in step.items()}
        widths = {name: batch["input_ids"].shape[1] for name, batch in step.items()}
        return Pass(run, order, widths, {name: dict(enumerate(one)) for name, one in labels.items()})

    def read_seconds(self) -> float:
        """Return how long it takes to read a step's score once the step's passes are done."""
        self._take_back({"retain": chosen_rows(self._heaviest_step["retain"], [0])}, scored=True)
        seconds = seconds_of(self._read_score)
        self._forget_gradients()
        return seconds

    def _take_back(self, step: Mapping[str, Mapping[str, Tensor]], *, scored: bool) -> None:
        trainer, batches = self.trainer, {name: self._moved(batch) for name, batch in step.items()}
        rows = sum(len(batch["input_ids"]) for batch in batches.values())  # where it is scored, of one set
        model = trainer.adapted.train()
        with trainer.step_scores.watched(rows, trainer.args.device) if scored else nullcontext():
            trainer.compute_loss(model, batches).backward()

    def _read_score(self) -> None:
        self.trainer.step_scores.take_frozen()
        self.trainer.step_scores.read()

    def _forget_gradients(self) -> None:
        self.trainer.adapted.zero_grad(set_to_none=True)
        self.trainer.adapted.eval()

    def of_step(self, tokens: Mapping[str, int], names: Sequence[str]) -> list[float]:
        """Return the tokens of a step's passes over some of its sets; `tokens` are those of each set's batch.

        Where a step goes by parts what is pushed down is first read without gradients, a third of a pass with them. A
        forget loss that looks ahead reads it with them, and once more without, if the first step of relearning teaches.
        """
        most = self._rows_of_pass
        if most is None:
            return [sum(tokens[name] for name in names)]
        passes: list[float] = []
        for name in names:
            parts = sum(ceil(rows / most[name]) for rows in self._passed_together(name))
            part, ahead = tokens[name] / parts, name == "forget" and self.looks_ahead
            passes += [part] * parts * ahead + [part * (1.0 if name == "retain" else 4 / 3)] * parts
        return passes

    @property
    def taken_back(self) -> list[str]:
        """Return the sets whose loss a step takes back while it forgets."""
        return list(self._heaviest_step) if self.settings.pushes_down else ["retain"]

    @property
    def batch_rows(self) -> dict[str, int]:
        """Return the rows of each set in one step: all of them where the set is smaller than its batch."""
        return {name: len(batch["input_ids"]) for name, batch in self._heaviest_step.items()}

    @property
    def looks_ahead(self) -> bool:
        """Say whether the forget loss is taken from moved adapters."""
        return self.trainer.balance.looks_ahead(forgetting=True)

    def _passed_together(self, name: str) -> list[int]:
        """Return the rows of a set that may share a pass: of a forget loss that looks ahead those of half a batch."""
        rows = self.batch_rows[name]
        return half_sizes(rows) if name == "forget" and self.looks_ahead else [rows]

    @property
    def _rows_of_pass(self) -> dict[str, int] | None:
        """Return the most rows of a pass of each set; None where the whole step is one pass, as the trainer decides."""
        most, largest = self.settings.micro_batch_size, max(self.batch_rows.values())
        if not self.looks_ahead and (most is None or most >= largest):
            return None
        return {name: min(most or largest, self._passed_together(name)[0]) for name in self.batch_rows}

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return on_device(batch, self.trainer.args.device)


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageMemory:
    """What one stage needs at its heaviest moment, in bytes, and what the process then holds."""

    stage: str
    weights: int
    adapters: int
    optimizer: int  # its moments, and a point to roll back to
    activations: int  # and gradients; in the export the cut copies of the weights
    resident: int

    @property
    def needed(self) -> int:
        return self.weights + self.adapters + self.optimizer + self.activations


@dataclass(frozen=True)
class Held:
    """What makes a need into what the process holds, on a CPU; both as measured in small passes."""

    process: int  # bytes before the model is loaded
    allocator: float  # >= 1: what the C library holds for each byte of activations, freed pieces that fit nothing


def stage_memory(needs: Sequence[Mapping[str, Any]], held: Held | None) -> list[StageMemory]:
    """Return the stages' memory from their needs, in order; `held` None: of a GPU, where what is needed is counted.

    On a CPU the C library keeps what was freed for later, so a stage holds what an earlier one needed; weights are
    mapped from their file and go with their model.
    """
    stages, kept = [], 0
    for need in needs:
        own = need["adapters"] + need["optimizer"]
        kept = max(kept, own + round(need["activations"] * (held.allocator if held else 1.0)))
        total = need["weights"] + (kept if held else own + need["activations"])
        stages.append(StageMemory(**need, resident=total + (held.process if held else 0)))
    return stages


def trial_counts(footprint: Footprint, whole: Mapping[str, int]) -> dict[str, int]:
    """Return how many rows of each set a trial may have: all of them where these are few enough."""
    return affordable(footprint, whole, TRIAL_BYTES)
