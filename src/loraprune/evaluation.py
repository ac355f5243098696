"""Evaluation: a model, and perhaps a reference, measured on every set that is named by every metric, with intervals.

Reads    Settings; every row's scores (row_scores.py)
Gives    evaluate, evaluate_files, Evaluation
Source   metrics.py for every definition
Symbols  an entry = {"value", "interval", "rows", "facts"}, or {"missing": what would have to be there}
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, isfinite
from typing import Any

from loraprune.cache import Cache, Columns, cache_folder
from loraprune.inputs import load_set
from loraprune.interval import mean_interval, ratio_interval
from loraprune.membership import Attack, Side, attack, leakage
from loraprune.metrics import forget_quality, perplexity, probability, truth_ratio_of_forgotten, truth_ratio_of_kept
from loraprune.model import check_machine, quiet_libraries
from loraprune.records import Interval
from loraprune.row_scores import ROUGE, EncodedSet, Subject, refuse_other_tokens
from loraprune.settings import Settings

Entry = dict[str, Any]
SETS = ("forget", "retain", "holdout", "bystander", "guard")
OF_REFERENCE = ("forget", "holdout")  # the sets that a reference is measured on
READ_ONLY = {"model": ("guard",), "reference": ("holdout",)}  # sets of which one pass over the rows is all that counts
MEANS = ("extraction_strength", "exact_memorization", "probability", "exact_match", "loss")  # over all rows
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradient_norm")
FEW_FACTS = "an interval needs at least two facts on a side"
TRUTH_RATIOS: dict[str, tuple[Callable[[Sequence[float]], float], str]] = {
    "unknown": (truth_ratio_of_forgotten, "mean of min(R, 1/R): 1 where right and wrong are equally likely"),
    "known": (truth_ratio_of_kept, "mean of max(0, 1 - R): high where the right answer is likelier"),
}


@dataclass(frozen=True)
class Scored:
    """One set under one model: its rows' scores by part; parts that were not asked for are empty."""

    encoded: EncodedSet
    teacher_forced: Columns
    written: Columns = field(default_factory=dict)
    candidates: Columns = field(default_factory=dict)
    gradients: Columns = field(default_factory=dict)

    def facts(self, part: Columns) -> list[int]:
        """Return the fact of each of a part's rows."""
        facts = self.encoded.facts
        return [facts[int(row)] for row in part["row"]] if "row" in part else list(facts)

    def side(self, name: str) -> Side:
        """Return the rows as one side of a membership attack."""
        columns = self.gradients if name == "gradient_norm" else self.teacher_forced
        return Side(columns[name], self.encoded.facts)


@dataclass(frozen=True)
class Evaluation:
    """What was measured: the numbers as JSON holds them, and the sets' rows they come from."""

    values: dict[str, Any]
    scored: Mapping[str, Scored]


def evaluate_files(settings: Settings) -> dict[str, Any]:
    """Return all numbers of the settings' model on each set that they name, and of the reference on the forget set."""
    return evaluate(settings).values


def evaluate(settings: Settings) -> Evaluation:
    """Return all numbers and the rows' scores; what an earlier call has measured on the same content is not done again.

    Raises UserError for the first thing that is wrong with model, reference or sets, before anything is measured.
    """
    check_machine(settings)
    with quiet_libraries():
        cache = Cache(cache_folder(settings.cache))
        rows = {name: load_set(settings, name, source) for name in SETS if (source := getattr(settings, name))}
        subjects = {"model": Subject(settings.model, settings, cache)}
        if settings.reference:
            subjects["reference"] = Subject(settings.reference, settings, cache)
        encoded = {
            label: {name: one.encode(name, those) for name, those in rows.items() if _asked_of(label, name)}
            for label, one in subjects.items()
        }
        for name, one in encoded.get("reference", {}).items():
            refuse_other_tokens(encoded["model"][name], one)
        scored = {label: _score(subjects.pop(label), label, sets) for label, sets in encoded.items()}
    return Evaluation(_values(scored["model"], scored.get("reference", {}), settings), scored["model"])


def _asked_of(label: str, name: str) -> bool:
    return label == "model" or name in OF_REFERENCE


def _score(subject: Subject, label: str, sets: Mapping[str, EncodedSet]) -> dict[str, Scored]:
    """Return every set's rows' scores; the subject's weights go when it does."""
    attacked = OF_REFERENCE if label == "model" and set(OF_REFERENCE) <= sets.keys() else ()
    read_only = READ_ONLY[label]
    return {
        name: _score_set(subject, one, whole=name not in read_only, attacked=name in attacked)
        for name, one in sets.items()
    }


def _score_set(subject: Subject, one: EncodedSet, *, whole: bool, attacked: bool) -> Scored:
    settings = subject.settings
    return Scored(
        one,
        subject.teacher_forced(one),
        subject.written(one) if whole and settings.rouge_rows and one.asked else {},
        subject.candidates(one) if whole and one.compared else {},
        subject.gradients(one) if attacked and settings.gradient_norm else {},
    )


# --- from rows to numbers ---------------------------------------------------------------------------------------------


def _values(model: Mapping[str, Scored], reference: Mapping[str, Scored], settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = {name: _set_values(one, settings) for name, one in model.items()}
    if "forget" in reference:
        values["reference"] = _set_values(reference["forget"], settings)
    return {**values, "model": _model_values(model, reference, settings)}


def _set_values(one: Scored, settings: Settings) -> dict[str, Any]:
    """Return a set's numbers: those of `evaluate.Measured` beside each other, and every metric as an entry."""
    columns, facts = one.teacher_forced, one.encoded.facts
    columns = {**columns, "exact_match": columns["exact"]}
    entries = {name: entry(columns[name], facts) for name in MEANS}
    if one.encoded.name != "guard":
        entries["fact_performance"] = _fact_performance(columns["fact_loss"], facts)
        entries |= _rouge_entries(one, settings) | _candidate_entries(one)
    return {
        "performance": entries["probability"]["value"],
        **{name: entries.get(name, {}).get("value") for name in ("loss", "exact_match", "fact_performance")},
        "rows": len(facts),
        "facts": len(set(facts)),
        "performance_interval": entries["probability"].get("interval"),
        "metrics": entries,
    }


def entry(values: Sequence[float], facts: Sequence[int]) -> Entry:
    """Return the mean over the rows that have a value, its interval and on how many rows and facts it stands."""
    kept = [(value, fact) for value, fact in zip(values, facts, strict=True) if isfinite(value)]
    if not kept:
        return {"missing": "no row has a value: every answer is its end alone"}
    numbers, those = [value for value, _ in kept], [fact for _, fact in kept]
    sizes = {"rows": len(kept), "facts": len(set(those))}
    return {"value": sum(numbers) / len(numbers), **_interval(mean_interval(numbers, those)), **sizes}


def _interval(found: Interval | None) -> Entry:
    return {"interval_missing": FEW_FACTS} if found is None else {"interval": list(found)}


def _fact_performance(losses: Sequence[float], facts: Sequence[int]) -> Entry:
    if not any(map(isfinite, losses)):
        return {"missing": "no row marks facts: give a column facts with strings of the answer"}
    return entry(probability(losses).tolist(), facts)


def _rouge_entries(one: Scored, settings: Settings) -> dict[str, Entry]:
    if one.written:
        return {name: entry(one.written[name], one.facts(one.written)) for name in ROUGE}
    plain = "the rows are plain text, so there is nothing to ask"
    missing = "--rouge-rows is 0: no answers were generated" if settings.rouge_rows == 0 else plain
    return {name: {"missing": missing} for name in ROUGE}


def _candidate_entries(one: Scored) -> dict[str, Entry]:
    columns, names = one.candidates, ("truth_ratio", "probability_with_options")
    if not columns:
        missing = "no row has wrong answers: give columns perturbed_answer and paraphrased_answer"
        return {name: {"missing": missing} for name in names}
    facts = one.facts(columns)
    aggregate, words = TRUTH_RATIOS["known" if one.encoded.name in ("retain", "bystander") else "unknown"]
    ratios = entry([aggregate([ratio]) for ratio in columns["truth_ratio"]], facts)
    shares = entry(columns["probability_with_options"], facts)
    return {"truth_ratio": {**ratios, "aggregate": words}, "probability_with_options": shares}


# --- of the model as a whole ------------------------------------------------------------------------------------------


def _model_values(model: Mapping[str, Scored], reference: Mapping[str, Scored], settings: Settings) -> dict[str, Any]:
    return {
        "forget_quality": _forget_quality(model.get("forget"), reference.get("forget")),
        "privleak": _privleak(model, reference),
        "membership": {name: _membership(name, model, reference, settings) for name in ATTACKS},
        "perplexity": _perplexity(model.get("guard"), settings),
        "compat": settings.compat,
    }


def _forget_quality(forget: Scored | None, reference: Scored | None) -> Entry:
    if forget is None or not forget.candidates:
        return {"missing": "no row of --forget has wrong answers: give columns perturbed_answer and paraphrased_answer"}
    if reference is None:
        return {"missing": "no --reference: there is no model without the forget set to compare with"}
    ratios = forget.candidates["truth_ratio"]
    value = forget_quality(ratios, reference.candidates["truth_ratio"])
    why = "it is a p-value, itself a statement on chance"
    facts = len(set(forget.facts(forget.candidates)))
    return {"value": value, "interval_missing": why, "rows": len(ratios), "facts": facts}


NO_HOLDOUT = "no --holdout: members can be told only from rows of their kind that were never seen"


def _membership(name: str, model: Mapping[str, Scored], reference: Mapping[str, Scored], settings: Settings) -> Entry:
    """Return the AUC of telling the forget set from the holdout by one score."""
    if not {"forget", "holdout"} <= model.keys():
        return {"missing": NO_HOLDOUT}
    if name == "reference" and not reference:
        return {"missing": "no --reference: this attack compares with its loss"}
    if name == "gradient_norm" and not settings.gradient_norm:
        return {"missing": "--no-gradient-norm was given"}
    if name == "reference":
        sides = [_beyond(model[one], reference[one]) for one in OF_REFERENCE]
    else:
        sides = [model[one].side(name) for one in OF_REFERENCE]
    return _attack_entry(attack(*sides))


def _beyond(one: Scored, reference: Scored) -> Side:
    """Return each row's loss beyond the reference's."""
    pairs = zip(one.teacher_forced["loss"], reference.teacher_forced["loss"], strict=True)
    return Side([here - there for here, there in pairs], one.encoded.facts)


def _attack_entry(found: Attack | None) -> Entry:
    if found is None:
        return {"missing": "a side has no row with a score: every answer is its end alone"}
    sizes = {"members": found.members, "others": found.others}
    return {"value": found.value, **_interval(found.interval), **sizes}


def _privleak(model: Mapping[str, Scored], reference: Mapping[str, Scored]) -> Entry:
    if not {"forget", "holdout"} <= model.keys():
        return {"missing": NO_HOLDOUT}
    sides, theirs = (
        tuple(those[name].side("min_k") for name in OF_REFERENCE) if those else None for those in (model, reference)
    )
    against = "the reference's AUC" if reference else "guessing, an AUC of 0.5: no --reference was given"
    found = _attack_entry(leakage(sides, theirs))  # pyright: ignore[reportArgumentType]
    return {**found, "score": "min_k", "against": against}


def _perplexity(guard: Scored | None, settings: Settings) -> Entry:
    """Return perplexity on the guard text, with the context length that it depends on."""
    if guard is None:
        return {"missing": "no --guard: there is no plain text to measure it on"}
    tokens, facts = guard.teacher_forced["tokens"], guard.encoded.facts
    nats = [loss * count for loss, count in zip(guard.teacher_forced["loss"], tokens, strict=True)]
    found = ratio_interval(nats, tokens, facts)
    return {
        "value": perplexity(sum(nats), int(sum(tokens))),
        **_interval(None if found is None else (exp(found[0]), exp(found[1]))),
        **{"rows": len(tokens), "facts": len(set(facts)), "tokens": int(sum(tokens)), "context": settings.max_length},
    }
