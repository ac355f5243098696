"""TOFU suite: forget set, retain set, real authors and world facts, measured as open-unlearning does.

Reads    forgetXX, forgetXX_perturbed, retain_perturbed, real_authors_perturbed, world_facts_perturbed, holdoutXX if any
Gives    run_tofu; writes TOFU_EVAL.json and TOFU_SUMMARY.json
Source   TOFU, arXiv 2401.06121; open-unlearning, arXiv 2506.12618
Symbols  k wrong answers a row; para = the right answer in other words, pert = wrong answers
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from loraprune.cache import Columns
from loraprune.errors import UserError
from loraprune.evaluation_log import EvaluationLog
from loraprune.generation import ANSWER_TOKENS
from loraprune.log_aggregates import Entry
from loraprune.log_writer import Content, likely, metric, scored
from loraprune.metrics import probability_with_options, truth_ratio
from loraprune.row_scores import EncodedSet, Subject, prompt_of
from loraprune.settings import Settings
from loraprune.sources import Row
from loraprune.suite import (
    Rows,
    Source,
    asked,
    log_attacks,
    not_measured,
    refuse_reference,
    run_suite,
    tokens_of,
    written,
)

if TYPE_CHECKING:
    from loraprune.benchmark import Request

KEPT = {"retain": "retain_perturbed", "ra": "real_authors_perturbed", "wf": "world_facts_perturbed"}
NO_HOLDOUT = "no {}.json: there is nothing that the model never saw to tell the forget set from"
RATIO_NAMES = {"forget": "forget_truth_ratio"}  # else PREFIX_Truth_Ratio


def run_tofu(settings: Settings, request: "Request") -> dict[str, Entry]:
    """Return the suite's aggregates on the settings' model, having written its log; raises what `run_suite` does."""
    rows, found = run_suite("TOFU", settings, request, partial(read_tofu, split=request.split), measure_tofu)
    no_holdout = None if "holdout" in rows else NO_HOLDOUT.format(_holdout(request.split))
    rouge = [*(f"{name}_Q_A_ROUGE" for name in ("forget", *KEPT)), "model_utility"]  # utility is made of ROUGE as well
    return dict(sorted((found | not_measured(settings, rouge, no_holdout)).items()))


def read_tofu(source: Source, split: str) -> Rows:
    """Return the suite's rows: "forget" and "holdout" as they are asked, the others with wrong answers."""
    names = {"forget": split, "forget compared": f"{split}_perturbed", **KEPT}
    missing = [name for name in names.values() if source.find(name) is None]
    if missing:
        raise UserError(
            f"{source.where} lacks {', '.join(f'{name}.json' for name in missing)}.",
            "the suite's numbers are of all its files.",
            "add them to the folder, or name the folder that has them with --data.",
        )
    rows = {name: source.rows(file) for name, file in names.items()}
    for name in ("forget compared", *KEPT):
        _refuse_incomparable(rows[name], names[name])
    _refuse_other_questions(rows["forget"], rows["forget compared"], split)
    return rows if source.find(_holdout(split)) is None else {**rows, "holdout": source.rows(_holdout(split))}


def _holdout(split: str) -> str:
    return split.replace("forget", "holdout")


def _refuse_incomparable(rows: Sequence[Row], name: str) -> None:
    for row in rows:
        if len(row.perturbed_answers) != len(rows[0].perturbed_answers) or not row.perturbed_answers:
            raise UserError(
                f"row {row.number} of {name} has {len(row.perturbed_answers)} wrong answers, the first row "
                f"{len(rows[0].perturbed_answers)}.",
                "a truth ratio compares the right answer with the same number of wrong ones in every row.",
                "take TOFU's own file.",
            )


def _refuse_other_questions(rows: Sequence[Row], compared: Sequence[Row], split: str) -> None:
    pairs = zip(rows, compared, strict=False)
    other = next((one.number for one, two in pairs if one.prompt != two.prompt), None)
    if other is not None or len(rows) != len(compared):
        where = f"row {other} of {split}" if other else f"{split} has {len(rows)} rows; it"
        raise UserError(
            f"{where} is not that of {split}_perturbed, which has {len(compared)}.",
            "both files ask the same questions in the same order.",
            "take both from one copy of TOFU.",
        )


def measure_tofu(subject: Subject, rows: Rows, reference: EvaluationLog | None) -> Content:
    """Return the rows' values of every metric of the suite under one model, in open-unlearning's schema."""
    forget = subject.encode("forget", rows["forget"])
    if reference is not None:
        refuse_reference(reference, "forget_Q_A_ROUGE", asked(subject, forget.rows, forget.examples), tokens_of(forget))
    content: Content = {"forget_quality": {}, "model_utility": {}}
    content |= _memorized(subject, forget) | _asked(subject, "forget", forget)
    content |= _compared(subject, "forget", rows["forget compared"], right=None)
    if "holdout" in rows:
        settings = subject.settings
        other = Subject(settings.reference, settings, subject.cache) if settings.reference else None
        content |= log_attacks(subject, other, forget, subject.encode("holdout", rows["holdout"]))
        content["privleak"] = {}
    for name in KEPT:
        encoded = subject.encode(name, rows[name])
        content |= _asked(subject, name, encoded)
        content |= _compared(subject, name, rows[name], right=subject.teacher_forced(encoded))
    return content


def _memorized(subject: Subject, encoded: EncodedSet) -> Content:
    columns = subject.teacher_forced(encoded)
    return {name: scored(columns[name]) for name in ("exact_memorization", "extraction_strength")}


def _asked(subject: Subject, name: str, encoded: EncodedSet) -> Content:
    """Return probability and ROUGE of the right answers."""
    columns = subject.teacher_forced(encoded)
    found: Content = {f"{name}_Q_A_Prob": likely(columns["probability"], columns["loss"])}
    if subject.settings.rouge_rows:
        prompts = [prompt_of(one) for one in encoded.examples]
        texts = asked(subject, encoded.rows, encoded.examples)
        found[f"{name}_Q_A_ROUGE"] = written(subject, name, prompts, texts, new_tokens=ANSWER_TOKENS)
    return found


def _compared(subject: Subject, name: str, rows: Sequence[Row], right: Columns | None) -> Content:
    """Return what the wrong answers make of a set: their probabilities, truth ratios, and the right ones' share.

    Where rows have no paraphrase, the answer itself takes its place, and the share is counted too.
    """
    count = len(rows[0].perturbed_answers)
    columns = _answered(
        subject, f"{name}, wrong answers", [(row, one) for row in rows for one in row.perturbed_answers]
    )
    wrong = {part: np.reshape(columns[part], (len(rows), count)).tolist() for part in ("probability", "loss")}
    found: Content = {f"{name}_Q_A_PERT_Prob": likely(wrong["probability"], wrong["loss"])}
    if any(row.paraphrased_answer is None for row in rows) and right is not None:
        shares = probability_with_options(right["probability"], wrong["probability"])
        found[f"{name}_Q_A_Prob_normalised"] = metric([{"prob": float(one)} for one in shares])
        losses = right["loss"]
    else:
        pairs = [(row, row.paraphrased_answer or row.answer) for row in rows]
        para = _answered(subject, f"{name}, paraphrases", pairs)
        found[f"{name}_Q_A_PARA_Prob"] = likely(para["probability"], para["loss"])
        losses = para["loss"]
    found[RATIO_NAMES.get(name, f"{name}_Truth_Ratio")] = scored(truth_ratio(losses, wrong["loss"]).tolist())
    return found


def _answered(subject: Subject, name: str, pairs: Sequence[tuple[Row, str]]) -> Columns:
    """Return the values of rows with another answer than their own."""
    rows = [replace(row, answer=answer, facts=(), fact_id=None) for row, answer in pairs]
    return subject.teacher_forced(subject.encode(name, rows))
