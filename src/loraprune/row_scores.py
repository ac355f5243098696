"""Row scores: every row's value of every metric under one model, each part of them in one pass and kept in a cache.

Reads    a checkpoint, sets of rows, the settings of an evaluation
Gives    Subject: teacher_forced, written, candidates, gradients; EncodedSet; refuse_other_tokens
Source   metrics.py, rouge.py and membership.py say what each value is
Symbols  a column = one number a row, NaN where the row has none; "row" = where a column's rows stand in their set
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any

from loraprune.answers import candidate_losses, read_answers
from loraprune.cache import Cache, Columns, checkpoint_identity, content_hash, program_identity
from loraprune.data import NO_LABEL, Example, Row, encode, examples_hash, find_facts
from loraprune.errors import UserError
from loraprune.generation import ANSWER_TOKENS, end_tokens, generate
from loraprune.membership import gradient_norms
from loraprune.metrics import probability, probability_with_options, truth_ratio, zlib_ratio
from loraprune.model import checked_config, device_of, load_model, load_tokenizer, pad_token_id
from loraprune.progress import stage
from loraprune.rouge import Rouge, rouge
from loraprune.settings import Settings
from loraprune.sources import say_rows

TEACHER_FORCED = (
    *("loss", "probability", "exact", "fact_loss", "exact_memorization", "extraction_strength"),
    *("min_k", "min_k_plus_plus"),
)
ROUGE = tuple(Rouge.__dataclass_fields__)


@dataclass(frozen=True)
class EncodedSet:
    """A set of rows as one model's tokenizer writes it; rows of one fact have the same number in `facts`."""

    name: str
    rows: Sequence[Row]
    examples: Sequence[Example]
    facts: Sequence[int]

    @property
    def asked(self) -> list[int]:
        """Return the places of rows that ask something; plain texts do not."""
        return [index for index, row in enumerate(self.rows) if row.messages]

    @property
    def compared(self) -> list[int]:
        """Return the places of rows that have wrong answers to be compared with."""
        return [index for index, row in enumerate(self.rows) if row.perturbed_answers]


def refuse_other_tokens(ours: EncodedSet, theirs: EncodedSet) -> None:
    """Raise UserError for the first row that a reference reads as other tokens, or answers from another place on."""
    for row, our, their in zip(ours.rows, ours.examples, theirs.examples, strict=True):
        if (our.input_ids, our.labels) != (their.input_ids, their.labels):
            raise UserError(
                f"the reference reads row {row.number} of the {ours.name} set as other tokens: "
                f"{len(their.input_ids)}, the model {len(our.input_ids)}.",
                "P, truth ratio and every attack are means over tokens; over other tokens they cannot be compared.",
                "give a --reference with the model's tokenizer and chat template.",
            )


class Subject:
    """A checkpoint that is evaluated; its weights are loaded when a number is wanted that no earlier run has kept."""

    def __init__(self, name: str, settings: Settings, cache: Cache) -> None:
        self.name, self.settings, self.cache = name, settings, cache
        self.config = checked_config(name, settings)
        self.tokenizer: Any = load_tokenizer(name, settings)

    @cached_property
    def model(self) -> Any:
        return load_model(self.name, self.settings)

    @cached_property
    def identity(self) -> dict[str, Any] | None:
        """Return what all numbers of this model depend on, rows aside; None where its weights cannot be told."""
        if self.cache.folder is None:
            return None
        weights = checkpoint_identity(self.name, getattr(self.config, "_commit_hash", None))
        if weights is None:
            return None
        chosen = {name: getattr(self.settings, name) for name in ("dtype", "compat", "trust_remote_code")}
        return {"weights": weights, "device": device_of(self.settings).type, **chosen, "program": program_identity()}

    @property
    def options(self) -> dict[str, Any]:
        return {
            "batch_size": self.settings.evaluate_batch_size,
            "pad_token_id": pad_token_id(self.tokenizer),
            "compat": self.settings.compat,
        }

    def encode(self, name: str, rows: Sequence[Row]) -> EncodedSet:
        """Return a set as this model reads it."""
        return EncodedSet(name, rows, self._tokens(name, rows), find_facts(rows))

    def _tokens(self, name: str, rows: Sequence[Row]) -> list[Example]:
        template, length = self.settings.template, self.settings.max_length
        return encode(rows, self.tokenizer, name=name, template=template, max_length=length)

    def texts(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Return tokens as text, special ones left out."""
        return [str(self.tokenizer.decode(one, skip_special_tokens=True)) for one in tokens]

    def answers(self, examples: Sequence[Example]) -> list[str]:
        """Return the text of the rows' labelled tokens, special tokens left out."""
        return self.texts([[label for label in one.labels if label != NO_LABEL] for one in examples])

    # --- the parts ----------------------------------------------------------------------------------------------------

    def teacher_forced(self, one: EncodedSet) -> Columns:
        """Return TEACHER_FORCED, tokens and zlib of every row, by one pass over the set."""

        def make() -> Columns:
            with stage(f"read {one.name}", len(one.rows)) as advance:
                columns = teacher_forced(self.model, one.examples, self.answers(one.examples), advance, self.options)
            _refuse_unmeasured(one, columns["loss"])
            return columns

        return self.cache.kept(self._identity("teacher_forced", one.examples), make)

    def written(self, one: EncodedSet) -> Columns:
        """Return ROUGE of a sample of rows that ask something, by what the model writes itself, greedily."""
        count = min(self.settings.rouge_rows, len(one.asked))
        chosen = sorted(random.Random(f"{self.settings.seed}/rouge").sample(one.asked, count))
        examples = [one.examples[index] for index in chosen]

        def make() -> Columns:
            with stage(f"write {one.name}", count) as advance:
                tokens = generate(
                    self.model,
                    [prompt_of(example) for example in examples],
                    end_token_ids=end_tokens(self.model, self.tokenizer),
                    advance=advance,
                    **self.options,
                )
            scores = rouge(self.answers(examples), self.texts([answer for [answer] in tokens]))
            return {name: [getattr(each, name) for each in scores] for name in ROUGE}

        # Rows padded to other lengths round otherwise, and a token that another one nearly ties with may change.
        batch = self.settings.evaluate_batch_size
        identity = self._identity("written", examples, new_tokens=ANSWER_TOKENS, batch_size=batch)
        columns = self.cache.kept(identity, make)
        return {"row": [float(index) for index in chosen], **columns}

    def candidates(self, one: EncodedSet) -> Columns:
        """Return truth ratio and probability with options of the rows that have wrong answers."""
        rows = [one.rows[index] for index in one.compared]
        answers = [[row.answer, row.paraphrased_answer or row.answer, *row.perturbed_answers] for row in rows]
        written = [
            [replace(row, answer=answer, facts=()) for answer in those]
            for row, those in zip(rows, answers, strict=True)
        ]
        encoded = [self._tokens(one.name, those) for those in written]
        everything = [example for those in encoded for example in those]

        def make() -> Columns:
            with stage(f"compare {one.name}", len(everything)) as advance:
                losses = candidate_losses(self.model, encoded, advance=advance, **self.options)
            pairs = [(truth_ratio([each[1]], [each[2:]]), _with_options(each)) for each in losses]
            return {
                "truth_ratio": [float(ratio[0]) for ratio, _ in pairs],
                "probability_with_options": [float(share) for _, share in pairs],
            }

        counts = [len(those) for those in encoded]
        columns = self.cache.kept(self._identity("candidates", everything, counts=counts), make)
        return {"row": [float(index) for index in one.compared], **columns}

    def gradients(self, one: EncodedSet) -> Columns:
        """Return the norm of every row's gradient."""
        options = {name: value for name, value in self.options.items() if name != "batch_size"}

        def make() -> Columns:
            with stage(f"gradients {one.name}", len(one.rows)) as advance:
                return {"gradient_norm": gradient_norms(self.model, one.examples, advance=advance, **options)}

        return self.cache.kept(self._identity("gradients", one.examples), make)

    def _identity(self, part: str, examples: Sequence[Example], **others: Any) -> dict[str, Any] | None:
        if self.identity is None:
            return None
        shown = {"rows": examples_hash(examples), "facts": content_hash([example.facts for example in examples])}
        return {**self.identity, "part": part, **shown, **others}


def teacher_forced(
    model: Any, examples: Sequence[Example], texts: Sequence[str], advance: Any, options: dict[str, Any]
) -> Columns:
    """Return TEACHER_FORCED, tokens and zlib of every row; `texts` are the rows' answers as text."""
    read = read_answers(model, examples, advance=advance, **options)
    columns = {name: [float(getattr(one, name)) for one in read] for name in TEACHER_FORCED}
    columns["tokens"] = [float(one.right.size) for one in read]
    columns["zlib"] = [zlib_ratio(one.loss, text) for one, text in zip(read, texts, strict=True)]
    return columns


def prompt_of(example: Example) -> tuple[int, ...]:
    """Return the tokens before the row's first answer token."""
    first = next(place for place, label in enumerate(example.labels) if label != NO_LABEL)
    return example.input_ids[:first]


def _with_options(losses: Any) -> float:
    """Return the right answer's share, from the losses of the right one, its paraphrase and the wrong ones."""
    return float(probability_with_options(probability(losses[:1]), probability(losses[2:])[None])[0])


def _refuse_unmeasured(one: EncodedSet, losses: Sequence[float]) -> None:
    """Raise UserError where a row's loss is no number: left out in silence, it would make the set look better known."""
    broken = [row.number for row, loss in zip(one.rows, losses, strict=True) if not isfinite(loss)]
    if broken:
        raise UserError(
            f"the model gives no finite loss on {len(broken)} of {len(losses)} rows of the {one.name} set: "
            f"{say_rows(broken)}.",
            "its weights hold NaN, or overflow in their number format; a mean over the rest would be about other rows.",
            "try --dtype float32; where it stays, the checkpoint is broken.",
        )
