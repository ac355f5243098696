"""Log writer: an evaluation's rows as a log in open-unlearning's schema, and its aggregates beside.

Reads    values of rows, NaN where a row has none
Gives    scored, likely, attacked: a metric's rows; write_log
Source   the files of open-unlearning, arXiv 2506.12618
Symbols  n rows, k wrong answers a row
"""

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from loraprune.evaluation_log import SIDES, EvaluationLog, log_of
from loraprune.folder import write_json
from loraprune.log_aggregates import Entry, aggregates

Content = dict[str, dict[str, Any]]

SUMMARY = (  # what open-unlearning's own summary of TOFU and MUSE holds
    *("exact_memorization", "extraction_strength", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_quality"),
    *("forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "retain_knowmem_ROUGE", "model_utility", "privleak"),
    *("mia_gradnorm", "mia_loss", "mia_min_k", "mia_min_k_plus_plus", "mia_reference", "mia_zlib"),
)


def metric(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a metric's rows, numbered from 0."""
    return {"value_by_index": {str(row): dict(one) for row, one in enumerate(rows)}}


def scored(values: Sequence[float]) -> dict[str, Any]:
    """Return rows of one score each; NaN, an answer of no token, is null."""
    return metric([{"score": None if isnan(one) else float(one)} for one in values])


def likely(probabilities: Sequence[Any], losses: Sequence[Any]) -> dict[str, Any]:
    """Return rows of probability and mean loss, of one answer each or of k."""
    return metric([{"prob": one, "avg_loss": loss} for one, loss in zip(probabilities, losses, strict=True)])


def attacked(members: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Return both sides of a membership attack."""
    return dict(zip(SIDES, map(scored, (members, others)), strict=True))


def write_log(folder: Path, name: str, content: Content, reference: EvaluationLog | None) -> dict[str, Entry]:
    """Write NAME_EVAL.json and NAME_SUMMARY.json, each whole or not at all, and return the aggregates.

    `content` is rows alone, and an empty metric for each that is counted from others. The first file holds what the
    model wrote in answer to the rows, and the rows, in clear, as the schema wants it; no other file does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_EVAL.json"
    found = aggregates(log_of(path, content), reference)
    write_json(path, {one: _stated(found[one], content[one]) for one in sorted(content)})
    summary = {
        one: found[one]["agg_value"] for one in sorted(SUMMARY) if found.get(one, {}).get("agg_value") is not None
    }
    write_json(folder / f"{name}_SUMMARY.json", summary)
    return found


def _stated(entry: Entry, rows: dict[str, Any]) -> dict[str, Any]:
    """Return a metric's rows with what was counted from them in its places."""
    sides = {side: _stated(entry[side], rows[side]) for side in SIDES if side in rows}
    return {**rows, **sides, **({"auc": entry["auc"]} if sides else {}), "agg_value": entry["agg_value"]}
