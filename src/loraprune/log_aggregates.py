"""Log aggregates: every aggregate of an evaluation log, counted again from the values of its rows.

Reads    an EvaluationLog, and the reference model's where there is one
Gives    aggregates: under the names that the log's own code gives them
Source   open-unlearning, arXiv 2506.12618; the first TOFU code's aggregation, arXiv 2401.06121, without its epsilon
Symbols  R truth ratio; n rows
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hmean

from loraprune import metrics
from loraprune.evaluation_log import SIDES, TOFU_TASKS, EvaluationLog, columns_of
from loraprune.interval import auc_interval, mean_interval, resampled_interval
from loraprune.log_pairs import check_pair

Entry = dict[str, Any]  # agg_value, rows, interval; what is missing, where something is
Numbers = NDArray[np.float64]

SAME = 1e-9  # a stated aggregate further off than this part is said to differ
FORGET_RATIO, ATTACK = "forget_truth_ratio", "mia_min_k"  # what forget quality and privleak are counted from
COMPOSED = ("forget_quality", "model_utility", "privleak")  # counted from other metrics, with no rows of their own
BESIDE_REFERENCE = ("forget_quality", "privleak", "Forget Quality")
PART_OF = {"retain": "retain", "ra": "real_authors", "wf": "world_facts"}  # a log's prefix, and the set in metrics.py
KEPT = {"Retain": "retain", "Real Authors": "real_authors", "Real World": "world_facts"}
SINGLE = ("mia_gradnorm", "mia_min_k", "mia_min_k_plus_plus")  # open-unlearning averages these in float32
NO_REFERENCE = "no --reference-log: the log of a model trained without the forget set"
NO_QUOTIENT = "a row's probabilities are so small that they are 0, and 0/0 is no number"
NO_VALUES = "the log holds no values of single rows for it"


def aggregates(log: EvaluationLog, reference: EvaluationLog | None = None) -> dict[str, Entry]:
    """Return every aggregate as {name: {"agg_value": x, "rows": n, "interval": [low, high]}}.

    `agg_value` is null where "missing" says what it lacks. An attack has "auc" and its two sides besides. "log_says" is
    the log's own aggregate where that is another. Raises UserError where the two logs are of different rows.
    """
    note = check_pair(log, reference) if reference is not None else None
    count = _tofu if log.schema == "tofu" else _open_unlearning
    found = count(log, reference)
    for name, entry in found.items():
        _say_difference(entry, log.stated.get(name))
        if note is not None and name in BESIDE_REFERENCE:
            entry["note"] = "; ".join(filter(None, (entry.get("note"), note)))
    return found


def _say_difference(entry: Entry, stated: float | None) -> None:
    value = entry["agg_value"]
    if stated is not None and (value is None or not math.isclose(value, stated, rel_tol=SAME, abs_tol=1e-300)):
        entry["log_says"] = stated


def _entry(value: float, rows: int, interval: Sequence[float] | None) -> Entry:
    entry: Entry = {"agg_value": value, "rows": rows, "interval": None if interval is None else list(interval)}
    return entry if math.isfinite(value) else {**entry, "agg_value": None, "missing": NO_QUOTIENT}


def _missing(what: str) -> Entry:
    return {"agg_value": None, "missing": what}


def _mean_interval(values: Any) -> Sequence[float] | None:
    return mean_interval(list(values), range(len(values)))


def _mean(values: Numbers) -> Entry:
    """Return the mean over rows, (n,) or (n, k); rows that are NaN are left out and counted."""
    rows = values.mean(1) if values.ndim == 2 else values
    counted = rows[~np.isnan(rows)]
    if not counted.size:
        return _missing("no row has a value")
    entry = _entry(float(counted.mean()), counted.size, _mean_interval(counted))
    return entry if counted.size == rows.size else {**entry, "left_out": rows.size - counted.size}


# --- open-unlearning --------------------------------------------------------------------------------------------------


def _open_unlearning(log: EvaluationLog, reference: EvaluationLog | None) -> dict[str, Entry]:
    found = {name: _counted(log, name) for name in log.names if name not in COMPOSED}
    found |= {name: _composed(name, log, found, reference) for name in COMPOSED if _concerns(name, log)}
    return dict(sorted(found.items()))


def _concerns(name: str, log: EvaluationLog) -> bool:
    """Return whether a log names a composed metric, or has what it is counted from."""
    needed = {"forget_quality": FORGET_RATIO, "privleak": f"{ATTACK} forget", "model_utility": "retain_Truth_Ratio"}
    return name in log.names or log.find(needed[name]) is not None


def _counted(log: EvaluationLog, name: str) -> Entry:
    if all(f"{name} {side}" in log.tables for side in SIDES):
        return _attack(log, name)
    if name not in log.tables:
        return _missing(NO_VALUES)
    columns = columns_of(log.tables[name])
    if "truth_ratio" in name.lower():
        return _truth_ratio(log.numbers(name, "score"), forgotten=name.lower().startswith("forget"))
    if "rougeL_recall" in columns:
        kind = "rougeL_f1" if "mem_" in name else "rougeL_recall"  # MUSE's knowmem and verbmem; TOFU's
        return {**_mean(log.numbers(name, kind)), "rouge_type": kind}
    column = next((one for one in ("prob", "score") if one in columns), None)
    return _mean(log.numbers(name, column)) if column else _missing(NO_VALUES)


def _truth_ratio(ratios: Numbers, *, forgotten: bool, epsilon: float = metrics.EPSILON) -> Entry:
    if forgotten:
        value = metrics.truth_ratio_of_forgotten(ratios, epsilon)
        rows = [metrics.truth_ratio_of_forgotten([one], epsilon) for one in ratios]
    else:
        value, rows = metrics.truth_ratio_of_kept(ratios), [metrics.truth_ratio_of_kept([one]) for one in ratios]
    return _entry(value, len(ratios), _mean_interval(rows))


def _attack(log: EvaluationLog, name: str) -> Entry:
    members, others = (log.numbers(f"{name} {side}", "score") for side in SIDES)
    entry = _entry(
        metrics.membership_auc(members, others), members.size + others.size, _auc_interval([(members, others)])
    )
    entry["auc"] = entry["agg_value"]
    for side, scores in zip(SIDES, (members, others), strict=True):
        entry[side] = _mean(scores)
        if name in SINGLE and (scores == scores.astype(np.float32)).all():
            entry[side]["agg_value"] = float(scores.astype(np.float32).mean())
        _say_difference(entry[side], log.stated.get(f"{name} {side}"))
    return entry


def _composed(name: str, log: EvaluationLog, found: Mapping[str, Entry], reference: EvaluationLog | None) -> Entry:
    if name == "model_utility":
        return _utility({part: (entry, table) for part, entry, table in _utility_parts(log, found)})
    return _forget_quality(log, reference) if name == "forget_quality" else _privleak(log, reference)


def _utility_parts(log: EvaluationLog, found: Mapping[str, Entry]) -> list[tuple[str, Entry, Numbers]]:
    """Return the parts of model utility that the log has: name, aggregate, and the rows that it is the mean of."""
    kinds = {"probability": "Q_A_Prob", "rouge": "Q_A_ROUGE", "truth": "Truth_Ratio"}
    parts = []
    for prefix, where in PART_OF.items():
        for part, kind in kinds.items():
            name = f"{prefix}_{kind}_normalised" if part == "probability" and prefix != "retain" else f"{prefix}_{kind}"
            table = log.find(name)
            if table is not None:
                parts.append((f"{where}_{part}", found[table], _utility_rows(log, table, part)))
    return parts


def _utility_rows(log: EvaluationLog, table: str, part: str) -> Numbers:
    column = {"probability": "prob", "rouge": "rougeL_recall", "truth": "score"}[part]
    values = log.numbers(table, column)
    return np.array([metrics.truth_ratio_of_kept([one]) for one in values]) if part == "truth" else values


def _utility(parts: Mapping[str, tuple[Entry, Numbers]]) -> Entry:
    lacking = [name for name in metrics.UTILITY_PARTS if name not in parts or parts[name][0]["agg_value"] is None]
    if lacking:
        return _missing(f"the log has no {', '.join(lacking)}")
    value = metrics.model_utility({name: entry["agg_value"] for name, (entry, _) in parts.items()})
    rows = {name: values for name, (_, values) in parts.items()}
    return _entry(value, sum({_set(name): len(one) for name, one in rows.items()}.values()), _utility_interval(rows))


def _set(part: str) -> str:
    return part.rsplit("_", 1)[0]


def _utility_interval(rows: Mapping[str, Numbers]) -> Sequence[float] | None:
    """Return the interval of model utility; a set's rows are drawn together for its three parts."""
    sets = {_set(name): len(one) for name, one in rows.items()}
    if min(sets.values()) < 2 or any(len(one) != sets[_set(name)] for name, one in rows.items()):
        return None

    def utility(*drawn: Any, axis: int) -> Any:
        places = dict(zip(sets, drawn, strict=True))
        return hmean([one[places[_set(name)]].mean(axis) for name, one in rows.items()])

    return resampled_interval([np.arange(size) for size in sets.values()], utility)


def _forget_quality(log: EvaluationLog, reference: EvaluationLog | None) -> Entry:
    return _p_value(*(_ratios(one) for one in (log, reference)), given=reference is not None)


def _ratios(log: EvaluationLog | None) -> Numbers | None:
    table = log.find(FORGET_RATIO) if log else None
    return log.numbers(table, "score") if log and table else None


# A p-value of resampled rows is no sample of p-values: they repeat, and the test sees it. So there is no interval.
def _p_value(ours: Numbers | None, theirs: Numbers | None, *, given: bool) -> Entry:
    if ours is None or theirs is None:
        lacking = "the log" if ours is None else "the reference's log"
        return _missing(f"{lacking} has no truth ratios of the forget set" if given or ours is None else NO_REFERENCE)
    return {**_entry(metrics.forget_quality(ours, theirs), len(ours), None), "note": "a p-value has no interval"}


def _privleak(log: EvaluationLog, reference: EvaluationLog | None) -> Entry:
    """Return privleak; without the reference's AUC against 0.5, as open-unlearning does, and said so."""
    ours, theirs = _attacked(log), _attacked(reference) if reference else None
    if ours is None:
        return _missing(f"the log has no {ATTACK} of forget and holdout rows")
    auc, rows = metrics.membership_auc(*ours), sum(map(len, ours))
    if theirs is not None:
        value = metrics.privleak(auc, metrics.membership_auc(*theirs))
        return _entry(value, rows, _auc_interval([ours, theirs], metrics.privleak))
    lacking = NO_REFERENCE if reference is None else f"the reference's log has no {ATTACK} of forget and holdout rows"
    entry = _entry(metrics.privleak(auc), rows, _auc_interval([ours], metrics.privleak))
    return {**entry, "missing": f"{lacking}; the AUC of guessing, {metrics.NO_MEMBER_AUC}, stands for the reference's"}


def _auc_interval(attacks: Sequence[tuple[Any, Any]], of: Callable[..., Any] = lambda auc: auc) -> Any:
    """Return the interval of what follows from attacks on the same rows; every row is a fact."""
    members, others = attacks[0]
    return auc_interval(attacks, range(len(members)), range(len(others)), of)


def _attacked(log: EvaluationLog) -> tuple[Numbers, Numbers] | None:
    if any(f"{ATTACK} {side}" not in log.tables for side in SIDES):
        return None
    members, others = (log.numbers(f"{ATTACK} {side}", "score") for side in SIDES)
    return members, others


# --- the first TOFU code ----------------------------------------------------------------------------------------------


def _tofu(log: EvaluationLog, reference: EvaluationLog | None) -> dict[str, Entry]:
    """Return the columns of the first TOFU code's leaderboard; its quotients have no epsilon under them."""
    entries: dict[str, Entry] = {}
    parts: dict[str, tuple[Entry, Numbers]] = {}
    for task, name in TOFU_TASKS.items():
        for label, part, entry, rows in _tofu_task(log, task):
            entries[f"{label} {name}"] = entry
            if name in KEPT and rows is not None:
                parts[f"{KEPT[name]}_{part}"] = (entry, rows)
    ratios = [_tofu_ratios(one) if one else None for one in (log, reference)]
    composed = {"Forget Quality": _p_value(*ratios, given=reference is not None), "Model Utility": _utility(parts)}
    return {**composed, **entries}


def _tofu_task(log: EvaluationLog, task: str) -> list[tuple[str, str, Entry, Numbers | None]]:
    """Return a task's three aggregates as (label, part of utility, entry, rows)."""
    labels = {
        "Prob.": ("probability", _tofu_probability),
        "ROUGE": ("rouge", _tofu_rouge),
        "Truth Ratio": ("truth", _tofu_truth),
    }
    found = []
    for label, (part, count) in labels.items():
        if task not in log.tables:
            found.append((label, part, _missing(f"the log has no {task}"), None))
        else:
            rows = count(log, task)
            found.append((label, part, _mean(rows), rows))
    return found


def _tofu_probability(log: EvaluationLog, task: str) -> Numbers:
    right = metrics.probability(log.numbers(task, "avg_gt_loss"))
    if task.startswith("eval_log"):
        return right
    return metrics.probability_with_options(right, np.exp(-log.numbers(task, "average_perturb_loss")), epsilon=0)


def _tofu_rouge(log: EvaluationLog, task: str) -> Numbers:
    return log.numbers(task, "rougeL_recall")


def _tofu_truth(log: EvaluationLog, task: str) -> Numbers:
    ratios = _tofu_ratios(log, task)
    if TOFU_TASKS[task] == "Forget":
        return np.array([metrics.truth_ratio_of_forgotten([one], epsilon=0) for one in ratios])
    return np.array([metrics.truth_ratio_of_kept([one]) for one in ratios])


def _tofu_ratios(log: EvaluationLog, task: str = "eval_log_forget.json") -> Any:
    if task not in log.tables:
        return None
    losses = (log.numbers(task, name) for name in ("avg_paraphrased_loss", "average_perturb_loss"))
    return metrics.truth_ratio(*losses, epsilon=0)
