"""Marks of the arena: what is measured of a checkpoint, and what that is worth beside the original and the reference.

Reads    a world, a checkpoint of it
Gives    measure_marks, marks_key; judge: the numbers of one contestant on one seed; paired: differences by seed
Source   closeness and the harmonic means: open-unlearning, arXiv 2506.12618; every number is the product's
Symbols  P = performance, ES = extraction strength; closeness(x) = 1 - |x - reference's| / what it can be at most
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from arena_worlds import CACHE, Values, World
from scipy.stats import hmean, ttest_1samp

from loraprune.attack_relearn import relearn
from loraprune.attack_weights import quantise
from loraprune.attacked import AttackedModel, AttackRows, Role, split_halves
from loraprune.evaluation import evaluate_files
from loraprune.metrics import retention
from loraprune.model import load_model, parameter_count
from loraprune.progress import show_nothing
from loraprune.quantised import QUANTISED
from loraprune.settings import Settings

EVALUATION: Values = {"rouge_rows": 0, "gradient_norm": False, "cache": str(CACHE / "evaluations")}
MEMBERSHIP = ("loss", "zlib", "min_k", "min_k_plus_plus")  # of privacy, as in the source
FORGOTTEN = ("performance", "extraction_strength", "truth_ratio")  # of memorisation
WITHHELD, TAUGHT = "final", "taught"
RELEARNING: Values = {"weights": "all"}
CONFIDENCE = 0.95


def marks_key() -> str:
    """Return a hash of what decides which marks there are and how they are taken; not of the code."""
    said = [EVALUATION, MEMBERSHIP, FORGOTTEN, RELEARNING, list(QUANTISED)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]


def measure_marks(world: World, model: str, role: Role = "unlearned") -> Values:
    """Return everything that is measured of a checkpoint: by evaluation, and under the attacks."""
    settings = world.settings
    known = _evaluated(replace(settings, model=model, retain=settings.final_rows))
    taught = evaluate_files(Settings(model=model, retain=settings.retain, **_machine(settings), **EVALUATION))
    membership, forget = known["model"]["membership"], known["forget"]
    sets = {WITHHELD: known["retain"], TAUGHT: taught["retain"]}
    sets |= {name: known[name] for name in ("bystander", "holdout", "guard") if name in known}
    return {
        "performance": forget["performance"],
        "exact_match": forget["exact_match"],
        "extraction_strength": forget["metrics"]["extraction_strength"]["value"],
        "truth_ratio": forget["metrics"]["truth_ratio"]["value"],
        "forget_quality": known["model"]["forget_quality"]["value"],
        "membership": {name: membership[name]["value"] for name in MEMBERSHIP},
        "sets": {name: {part: one[part] for part in ("performance", "loss")} for name, one in sets.items()},
        "parameters": parameter_count(load_model(model, settings)),
        **_attacked(world, model, role),
    }


def _machine(settings: Settings) -> Values:
    return {name: getattr(settings, name) for name in ("dtype", "device", "max_length", "template")}


def _evaluated(settings: Settings) -> Values:
    return evaluate_files(replace(settings, floor_rows=None, final_rows=None, **EVALUATION))


def _attacked(world: World, model: str, role: Role) -> Values:
    rows = world.inputs.rows
    shown, hidden = split_halves(rows["forget"], world.seed)
    attacked = AttackedModel.of(role, model, world.settings, AttackRows(rows["forget"], rows["taught"], shown, hidden))
    relearnt = relearn(attacked, show_nothing, **RELEARNING)
    rounded = {name: quantise(attacked, show_nothing, name).readings["performance"] for name in QUANTISED}
    return {
        "relearning": {
            "area": fmean(relearnt.readings["performance"].area or ()),
            "highest": fmean(relearnt.readings["performance"].after),
            "curve": [[one["step"], one["performance"]] for one in relearnt.details["curve"]],
        },
        "rounded": {name: fmean(one.after) for name, one in rounded.items()},
    }


# --- what marks are worth ---------------------------------------------------------------------------------------------


def closeness(value: float, reference: float) -> float:
    """Return 1 at the reference's value, 0 as far from it as a number in [0, 1] can be; both directions count."""
    return 1 - abs(value - reference) / max(reference, 1 - reference)


def judge(marks: Values, original: Values, reference: Values) -> Values:
    """Return one contestant's numbers on one seed: differences from the reference, what is kept, and the composites."""
    kept = _kept(marks, original)
    area, least = marks["relearning"]["area"], reference["relearning"]["area"]
    parts = {
        "memorisation": _mean(closeness(marks[name], reference[name]) for name in FORGOTTEN),
        "privacy": _mean(closeness(marks["membership"][name], reference["membership"][name]) for name in MEMBERSHIP),
        "utility": _mean(min(1.0, one) for one in kept.values()),
    }
    resistance = 1 - max(0.0, area - least) / (1 - least)
    return {
        "forget": marks["performance"],
        **{f"{name}_gap": marks[name] - reference[name] for name in FORGOTTEN},
        "forget_quality": marks["forget_quality"],
        "kept": kept,
        "auc_gap": marks["membership"]["min_k"] - reference["membership"]["min_k"],
        "relearning_gap": area - least,
        "rounded_gap": {name: one - marks["performance"] for name, one in marks["rounded"].items()},
        "left": marks["parameters"] / original["parameters"],
        **parts,
        "resistance": resistance,
        "composite": _mean(parts.values()),
        "composite_relearning": _mean([*parts.values(), resistance]),
    }


def _kept(marks: Values, original: Values) -> dict[str, float]:
    """Return retention on every set that was to be kept; of the guard, the original's loss over the loss now."""
    ours, theirs = marks["sets"], original["sets"]
    names = [name for name in (WITHHELD, TAUGHT, "bystander") if name in ours]
    kept = {name: retention(theirs[name]["performance"], ours[name]["performance"]) for name in names}
    return kept | ({"guard": theirs["guard"]["loss"] / ours["guard"]["loss"]} if "guard" in ours else {})


def _mean(values: Any) -> float:
    """Return the harmonic mean, 0 where one value is."""
    return float(hmean([max(0.0, one) for one in values]))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Values:
    """Return ours minus theirs over the seeds that both have, with the 95% interval of Student's t by seed."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return {"mean": fmean(differences), "seeds": len(differences), "interval": _interval(differences)}


def _interval(differences: Sequence[float]) -> list[float] | None:
    if len(differences) < 2:
        return None
    found: Any = ttest_1samp(differences, 0.0)
    between = found.confidence_interval(CONFIDENCE)
    return [float(between.low), float(between.high)]
