"""Result: what a run achieved, as metrics.json holds it, and which outcome that is.

Reads    the numbers before and after, the original's, decision.json, the events' durations
Gives    metrics_of, last_look
Source   the unlearning plan, section 6
Symbols  P = performance; original = the model before the first request
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loraprune.folder import RunFolder
from loraprune.inputs import Inputs, earlier_sets
from loraprune.interval import ratio_interval
from loraprune.memory import peak_bytes
from loraprune.metrics import forget_drop, retention, unlearning_efficiency
from loraprune.model import checkpoint_bytes, device_of
from loraprune.records import GroupKind, Look, Outcome
from loraprune.schedule import last_sparsity
from loraprune.settings import Settings
from loraprune.steering import Steering, Target

Values = dict[str, Any]
WITHHELD = ("floor", "final")
KEPT = ("floor", "final", "taught")


def metrics_of(
    folder: RunFolder,
    settings: Settings,
    inputs: Inputs,
    steering: Steering,
    before: Values,
    original: Values,
    after: Values,
) -> Values:
    """Return the content of metrics.json, schema 1."""
    decision, sets = folder.read("decision.json"), original["sets"]
    kept = {name: retention(sets[name]["performance"], after[name]["performance"]) for name in KEPT}
    intervals = {
        name: ratio_interval(after["rows"][name], sets[name]["row_performance"], inputs.facts[name])
        for name in WITHHELD
    }
    seconds = _seconds(folder)
    values: Values = {
        "schema": 1,
        "task": "unlearn" if settings.is_unlearning else "prune",
        "model": {
            "parameters": {"before": before["parameters"], "after": after["parameters"]},
            "bytes": {
                "before": checkpoint_bytes(settings.model),
                "after": checkpoint_bytes(str(folder.path / "model")),
            },
            "groups": decision["groups"],
            "class": after["class"],
            "form": after.get("form", "stock"),
        },
        "sparsity": (before["parameters"] - after["parameters"]) / before["parameters"],
        "sparsity_goal": settings.sparsity,
        "scores_left_out": decision["scores_left_out"],
        "steps_left_out": decision["steps_left_out"],
        "breaks": decision["breaks"],
        "ended_by": decision["ended_by"],
        "forget": None,
        "forget_drop": None,
        "unlearning_efficiency": None,
        "retain": {"before": before["final"], "after": after["final"], "original": sets["final"]["performance"]},
        "retain_taught": {"before": before["taught"], "after": after["taught"]},
        "holdout": _pair("holdout", before, after),
        "bystander": _pair("bystander", before, after),
        "retention": kept["final"],
        "retention_interval": intervals["final"],
        "retention_taught": kept["taught"],
        "retention_against": original["source"]["final"],
        "floor": {
            "min_retain_performance": settings.min_retain_performance,
            "held": kept["floor"] >= settings.min_retain_performance,
            "retention": kept["floor"],
            "interval": intervals["floor"],
            "rows": after["floor"]["rows"],
            "facts": after["floor"]["facts"],
            "against": original["source"]["floor"],
            "final_held": kept["final"] >= settings.min_retain_performance,
        },
        "guard": _guard_metrics(settings, before, original, after),
        "already_forgotten": _earlier_metrics(settings, steering, before, after),
        "target": None,
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(settings),
    }
    target = steering.target
    if target is not None:
        values |= _forget_metrics(before, after, target, bool(steering.spread), kept["final"], seconds["total"])
    values["outcome"] = _outcome(values, settings, target, decision)
    values["goal_met"] = values["outcome"] == ("target_reached" if target is not None else "budget_spent")
    return values


def _pair(name: str, before: Values, after: Values) -> Values | None:
    return {"before": before[name], "after": after[name]} if name in before else None


def _guard_metrics(settings: Settings, before: Values, original: Values, after: Values) -> Values | None:
    if (pair := _pair("guard", before, after)) is None:
        return None
    ratio = after["guard"]["loss"] / original["sets"]["guard"]["loss"]
    most = settings.max_guard_loss_ratio
    return {**pair, "loss_ratio": ratio, "max_guard_loss_ratio": most, "held": ratio <= most}


def _earlier_metrics(settings: Settings, steering: Steering, before: Values, after: Values) -> list[Values]:
    """Return each earlier request's set before and after, with its ceiling."""
    return [
        {
            "before": before[name],
            "after": after[name],
            "reference": before.get("reference", {}).get(name),
            "ceiling": one.high,
            "held": after[name]["performance"] <= one.high,
        }
        for name, one in zip(earlier_sets(settings), steering.ceilings, strict=True)
    ]


def _forget_metrics(
    before: Values, after: Values, target: Target, natural_spread: bool, kept: float, seconds: float
) -> Values:
    drop = forget_drop(before["forget"]["performance"], after["forget"]["performance"])
    removed = before["parameters"] - after["parameters"]
    reference = before.get("reference", {}).get("forget")
    return {
        "forget": {"before": before["forget"], "after": after["forget"], "reference": reference},
        "forget_drop": drop,
        "unlearning_efficiency": unlearning_efficiency(drop, kept, seconds, removed),
        "target": target.as_values(),
        "natural_spread": natural_spread,
    }


def _outcome(values: Values, settings: Settings, target: Target | None, decision: Values) -> Outcome:
    """Return what ended the run: the goal, or what stood in its way.

    A run that missed its goal and that a limit held back, be it once, ended at the floor: with less to keep it would
    have gone further. Only where P(forget) arrived and no candidate was left, it is those that were missing.
    """
    reached = decision["reached"] if settings.sparsity_of == "groups" else values["sparsity"]
    enough = settings.sparsity is None or reached >= last_sparsity(settings) - decision["smallest_step"]
    arrived = target is None or target.holds(values["forget"]["after"]["performance"])
    held = [values["floor"], *([values["guard"]] if values["guard"] else []), *values["already_forgotten"]]
    hard = ("floor", "guard", "ceiling", "room")
    held_back = decision["ended_by"] in hard or any(decision["breaks"].get(name) for name in hard)
    if not all(one["held"] for one in held) or not values["floor"]["final_held"]:
        return "floor_reached"  # the final rows, which steered nothing, have the last word
    if enough and arrived:
        return "budget_spent" if target is None else "target_reached"
    none_left = decision["ended_by"] == "no_candidates"
    if held_back and not (arrived and none_left):
        return "floor_reached"
    return "no_candidates" if none_left or not enough else "budget_spent"


def _seconds(folder: RunFolder) -> Values:
    """Return the seconds spent by kind of work, from the events; training counts all starts of a resumed run."""
    stages = [one for one in folder.events() if one["event"] == "stage"]
    train = next(one for one in reversed(stages) if one["name"] == "train")
    evaluate = sum(one["duration"] for one in stages if one["name"] == "evaluate")
    seconds = {
        "score": train["score"],
        "train": train["duration"] - train["score"],
        "evaluate": evaluate,
        "total": train["duration"] + evaluate,
    }
    return {name: round(one, 3) for name, one in seconds.items()}


def _peak_memory(settings: Settings) -> int:
    if device_of(settings).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_bytes()


def last_look(metrics: Values, kept_by_layer: Mapping[GroupKind, Sequence[int]]) -> Values:
    """Return the written model as a look, so that the last event holds the numbers that count."""
    forget = (metrics["forget"] or {}).get("after", {})
    return Look(
        sparsity=metrics["sparsity"],
        retention=metrics["floor"]["retention"],
        retention_interval=metrics["floor"]["interval"],
        forget=forget.get("performance"),
        forget_interval=forget.get("performance_interval"),
        guard_loss_ratio=(metrics["guard"] or {}).get("loss_ratio"),
        already_forgotten=tuple(one["after"]["performance"] for one in metrics["already_forgotten"]),
        groups={kind: tuple(kept) for kind, kept in kept_by_layer.items()},
    ).as_values()
