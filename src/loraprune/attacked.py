"""Attacked: one model under attack, the rows it is asked for, and what an attack hands back.

Reads    a checkpoint, its tokenizer, rows
Gives    AttackedModel, AttackRows, split_halves; Reading, AttackResult, as attacks.json holds them
Source   halves of independent facts: arXiv 2410.08827
Symbols  n rows; P = performance, as in evaluate.py
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from loraprune.answers import AnswerTokens, read_answers
from loraprune.data import Example, Row, find_facts
from loraprune.inputs import encode_set
from loraprune.interval import ratio_interval
from loraprune.model import load_model, load_tokenizer, pad_token_id
from loraprune.progress import Advance
from loraprune.settings import Settings

Role = Literal["unlearned", "original", "reference"]
Values = dict[str, Any]
DIGITS = 6  # of the rows' numbers in attacks.json


@dataclass(frozen=True)
class AttackRows:
    """The rows that attacks ask for and train on; the same for every model."""

    forget: Sequence[Row]
    taught: Sequence[Row]  # the part of the retain set that the run trained on
    shown: Sequence[Row]  # the half of the forget set that relearning trains on
    hidden: Sequence[Row]  # the other half, which it is scored on


def split_halves(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Return two halves, counted in units: rows of one fact, one text or one subject stay together.

    The second half is empty where there is one unit only.
    """
    units = find_facts(rows, by_subject=True)
    order = sorted(set(units))
    random.Random(f"{seed}/halves").shuffle(order)
    first = set(order[: (len(order) + 1) // 2])
    halves: tuple[list[Row], list[Row]] = ([], [])
    for row, unit in zip(rows, units, strict=True):
        halves[unit not in first].append(row)
    return halves


@dataclass(frozen=True)
class AttackedModel:
    """One of the models that an attack is run on; every attack loads it anew, for attacks change weights."""

    role: Role
    name: str  # folder or hub name
    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    rows: AttackRows

    @staticmethod
    def of(role: Role, name: str, settings: Settings, rows: AttackRows) -> "AttackedModel":
        return AttackedModel(role, name, settings, load_tokenizer(name, settings), rows)

    @property
    def pad_token_id(self) -> int:
        return pad_token_id(self.tokenizer)

    @property
    def options(self) -> Values:
        """How batches are made where answers are read or written."""
        return {"batch_size": self.settings.evaluate_batch_size, "pad_token_id": self.pad_token_id}

    def load(self) -> Any:
        return load_model(self.name, self.settings)

    def examples(self, rows: Sequence[Row], template: str | None = None) -> list[Example]:
        """Return the rows as this model reads them; a template that is given takes the place of the chat's too."""
        settings = self.settings if template is None else replace(self.settings, template=template)
        return encode_set(rows, self.tokenizer, "forget", settings)

    def answers(self, model: Any, rows: Sequence[Row], template: str | None = None) -> list[AnswerTokens]:
        """Return what the model gives the rows' answers."""
        return read_answers(model, self.examples(rows, template), spread=False, **self.options)


@dataclass(frozen=True)
class Reading:
    """One number of every row before and after an attack, all in [0, 1], (n,); rows of one fact share its number.

    `area`: the mean over an attack's steps, where it takes steps. `known`: which of the two tells what the original
    model knows: where guessing right is what stands before the attack, it is what stands after.
    """

    facts: Sequence[int]
    before: Sequence[float]
    after: Sequence[float]
    area: Sequence[float] | None = None
    known: Literal["before", "after"] = "before"

    def as_values(self) -> Values:
        """Return means, their 95% intervals over facts, and the rows' own numbers: nothing of their text."""
        columns = {name: getattr(self, name) for name in ("before", "after", "area") if getattr(self, name) is not None}
        values: Values = {}
        for name, column in columns.items():
            values |= {name: float(np.mean(column)), f"{name}_interval": interval_of(column, self.facts)}
        of_rows = {name: [round(float(one), DIGITS) for one in column] for name, column in columns.items()}
        counts = {"known": values[self.known], "rows": len(self.facts), "facts": len(set(self.facts))}
        return {**values, **counts, "row_values": {"facts": list(self.facts), **of_rows}}


def interval_of(values: ArrayLike, facts: Sequence[int]) -> tuple[float, float] | None:
    """Return the mean's 95% bootstrap interval over facts."""
    column = [float(one) for one in np.asarray(values)]
    return ratio_interval(column, [1.0] * len(column), facts)


@dataclass(frozen=True)
class AttackResult:
    """What one attack on one model gives: a reading for each measure, the headline's first, and what else it saw."""

    readings: Mapping[str, Reading]
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_values(self) -> Values:
        readings = {name: one.as_values() for name, one in self.readings.items()}
        return {"readings": readings, "details": dict(self.details)}


class NotRun(Exception):
    """Raised, with the reason, by an attack that cannot be had on this set or on this machine."""


Attack = Callable[[AttackedModel, Advance], AttackResult]


def readings_of(
    rows: Sequence[Row], before: Sequence[AnswerTokens], after: Sequence[AnswerTokens]
) -> dict[str, Reading]:
    """Return performance and extraction strength of the same rows before and after an attack."""
    facts = find_facts(rows)
    return {
        name: Reading(facts, [getattr(one, own) for one in before], [getattr(one, own) for one in after])
        for name, own in MEASURES.items()
    }


MEASURES = {"performance": "probability", "extraction_strength": "extraction_strength"}  # of attacks.json, of a row
