"""Plan: look before you leap: every check of a run, a scored sample, and what the run will need; changes nothing.

Reads    Settings, as the run would
Gives    make_plan: plain values, which plan_tables.py shows and --json prints
Source   -
Symbols  share = S / (1 + S); a slice is one group of a kind in every layer, of q_heads one in every kv_group
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PretrainedConfig

from loraprune.decision import Rules, decide_compression, decide_unlearning
from loraprune.folder import RunFolder
from loraprune.forms import form_of, has_stock_form, per_layer_config
from loraprune.inputs import Inputs, prepare, require
from loraprune.ledger import Ledger, read_ledger
from loraprune.mask import full_mask
from loraprune.model import device_of, load_measured, quiet_libraries, weights_hash
from loraprune.pipeline import find_original, measure_sets, refuse_changed_inputs, refuse_lost_floor
from loraprune.progress import stage
from loraprune.quantised import quietly
from loraprune.records import Decision, GroupKind, Mask, ModelGroups
from loraprune.rules import channel_multiple
from loraprune.schedule import last_sparsity
from loraprune.sensitivity import SensitivityDict
from loraprune.settings import Settings
from loraprune.surgery import cut_config
from loraprune.trial import Trial

Values = dict[str, Any]
THRESHOLDS = tuple(tenths / 10 for tenths in range(1, 10))
SHOWN_PAIRS = 3


def make_plan(settings: Settings) -> Values:
    """Return what a run under these settings would meet; raise the UserError with which it would end at once.

    Loads the weights to score a sample and to run small passes; nothing is written but in a temporary folder.
    """
    with quiet_libraries():
        inputs = check_run(settings)
        settings = inputs.settings
        with TemporaryDirectory() as scratch, quietly(), stage("plan", 4) as advance:
            trial = Trial(settings, inputs, Path(scratch))
            refuse_what_is_lost(trial, settings, inputs)
            advance(1, "model loaded")
            sensitivities = trial.score()
            advance(1, "sample scored")
            decide = Decider(sensitivities, trial.groups, trial.trainer.rules)
            goal = decide.at_goal(settings)
            values: Values = {
                "schema": 1,
                "task": "unlearn" if settings.is_unlearning else "prune",
                "device": str(device_of(settings)),
                "groups": group_values(trial.groups, decide),
                "scored": scored_values(settings, trial),
                "shares": share_values(settings, trial, decide) if settings.is_unlearning else None,
                "overlap": overlap_values(inputs),
                "checkpoint": checkpoint_values(inputs.config, trial.groups, goal, settings),
            }
            estimates = trial.estimates(goal)
            advance(2, "passes measured")
    return values | estimates


def check_run(settings: Settings) -> Inputs:
    """Return the inputs after every check that a run makes before it begins; without --output no folder is checked."""
    require(replace(settings, output=settings.output or "."))
    folder = RunFolder(Path(settings.output), settings) if settings.output else None
    if folder is not None:
        folder.check()
    inputs = prepare(settings)
    ledger_of(settings).next_id(settings.request_id)
    if folder is not None:
        refuse_changed_inputs(folder, settings, inputs)
    return inputs


def ledger_of(settings: Settings) -> Ledger:
    return read_ledger(settings.model, weights_hash(settings.model))


def refuse_what_is_lost(trial: Trial, settings: Settings, inputs: Inputs) -> None:
    """Raise the run's UserError where the model itself breaks the floor or the guard before anything is done."""
    names = [name for name in ("floor", "guard") if name in inputs.examples]
    given = load_measured(settings.model, settings) if trial.quantised else trial.trainer.adapted
    before = measure_sets(given, settings, inputs, names, "measure")
    refuse_lost_floor(settings, before, find_original(settings, inputs, ledger_of(settings), before, names))


# --- decisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decider:
    """What would go, by the decisions of the run itself, from one score of the untouched model."""

    sensitivities: SensitivityDict
    groups: ModelGroups
    rules: Rules

    def unlearn(self, **rules: Any) -> Decision:
        """Return what goes by dual score, whatever it is worth, under rules changed like this."""
        forget, retain = self.sensitivities.forget.values(), self.sensitivities.retain.values()
        kept, rules_now = full_mask(self.groups), replace(self.rules, **rules)
        return decide_unlearning(
            forget, retain, kept, self.groups, budget=self.groups.total_parameters, rules=rules_now
        )

    def compress(self, sparsity: float) -> Decision:
        """Return what goes by sensitivity on the retain set alone."""
        retain, kept = self.sensitivities.retain.values(), full_mask(self.groups)
        total, of_groups = self.groups.total_parameters, self.rules.of_groups
        budget, fraction = (total, sparsity) if of_groups else (int(sparsity * total), None)
        return decide_compression(retain, kept, self.groups, budget=budget, rules=self.rules, fraction=fraction)

    def at_goal(self, settings: Settings) -> Mask:
        """Return the mask that the scores lead to when the sparsity of the settings is pruned at once."""
        sparsity = last_sparsity(settings)
        budget = int(sparsity * self.groups.total_parameters)
        forget, retain, kept = self.sensitivities.forget, self.sensitivities.retain, full_mask(self.groups)
        if forget.totals is None:
            return kept.without(self.compress(sparsity).removals)
        decision = decide_unlearning(
            forget.values(), retain.values(), kept, self.groups, budget=budget, rules=self.rules
        )
        return kept.without(decision.removals)

    def sparsity(self, decision: Decision) -> float:
        return full_mask(self.groups).without(decision.removals).sparsity(self.groups)


def by_kind(decision: Decision, groups: ModelGroups) -> dict[GroupKind, int]:
    """Return how many groups of each kind a decision removes."""
    counts = Counter(one.group.kind for one in decision.removals)
    return {kind: counts[kind] for kind in groups.layers}


def group_values(groups: ModelGroups, decide: Decider) -> Values:
    """Return the groups by kind, layers of one size together, and which part of all parameters may go."""
    everything = decide.compress(1.0)
    removable = by_kind(everything, groups)
    return {
        "architecture": groups.family,
        "total_parameters": groups.total_parameters,
        "prunable": decide.sparsity(everything),
        "kinds": {
            kind: {
                "layers": _layer_runs(groups, kind),
                "removable": removable[kind],
                "prunable": _parameters(everything, groups, kind) / groups.total_parameters,
            }
            for kind in groups.layers
        },
    }


def _parameters(decision: Decision, groups: ModelGroups, kind: GroupKind) -> int:
    layers = groups.layers[kind]
    return sum(layers[one.group.layer].parameters_per_group for one in decision.removals if one.group.kind == kind)


def _layer_runs(groups: ModelGroups, kind: GroupKind) -> list[Values]:
    """Return runs of layers that have the same number of groups of the same size."""
    runs: list[Values] = []
    for one in groups.layers[kind]:
        own = {"groups": one.count, "parameters_per_group": one.parameters_per_group}
        if runs and {name: runs[-1][name] for name in own} == own:
            runs[-1]["last"] = one.layer
        else:
            runs.append({"first": one.layer, "last": one.layer, **own})
    return runs


def scored_values(settings: Settings, trial: Trial) -> Values:
    """Return what the plan has scored, and whether the run takes its scores from so many of its training steps."""
    return {
        "rows": {name: len(one) for name, one in trial.sample.items()},
        "run_from": settings.score_from,
        "run_steps": len(trial.scored_steps),
    }


def share_values(settings: Settings, trial: Trial, decide: Decider) -> Values:
    """Return how many candidates each threshold leaves, the run's own included, and whether that is enough."""
    thresholds = sorted({*THRESHOLDS, settings.unlearning_threshold})
    alone = decide.unlearn(threshold=thresholds[0], widths="per_layer", order="share", all_may_go=False)
    rows = []
    for threshold in thresholds:
        together = decide.unlearn(threshold=threshold, widths="uniform", all_may_go=False)
        asked = decide.unlearn(threshold=threshold, all_may_go=False)
        rows.append(
            {
                "threshold": threshold,
                "slices": _slices(together, trial.groups),
                "groups": by_kind(_above(alone, threshold), trial.groups),
                "sparsity": decide.sparsity(asked),
            }
        )
    most = decide.sparsity(decide.unlearn())
    return {
        "rows": {name: len(one) for name, one in trial.sample.items()},
        "metric": settings.metric,
        "threshold": settings.unlearning_threshold,
        "minimum_forget_sensitivity": settings.minimum_forget_sensitivity,
        "thresholds": rows,
        "asked": settings.sparsity,
        "all_may_go": decide.rules.all_may_go,
        "most": most,
        "enough": settings.sparsity is None or most >= settings.sparsity - trial.smallest_step,
    }


def _slices(decision: Decision, groups: ModelGroups) -> dict[GroupKind, int]:
    """Return how many slices of each kind a uniform decision removes."""
    sizes = {kind: sum(one.divisions for one in layers) for kind, layers in groups.layers.items()}
    return {kind: count // sizes[kind] for kind, count in by_kind(decision, groups).items()}


def _above(decision: Decision, threshold: float) -> Decision:
    """Return the part of a per-layer decision that a higher threshold leaves: its groups come in order of share."""
    return replace(decision, removals=tuple(one for one in decision.removals if (one.share or 0.0) > threshold))


# --- data, checkpoint -------------------------------------------------------------------------------------------------


def overlap_values(inputs: Inputs) -> Values | None:
    """Return how far the sets say the same, by numbers of rows alone; None where there is one set only."""
    if inputs.overlap is None:
        return None
    pairs = [{"forget": one, "retain": other, "containment": part} for one, other, part in inputs.overlap.near]
    return {"exact": len(inputs.overlap.exact), "near": len(pairs), "nearest": pairs[:SHOWN_PAIRS]}


def checkpoint_values(config: PretrainedConfig, groups: ModelGroups, goal: Mask, settings: Settings) -> Values:
    """Return the form and class of the result: for every number of attention groups left, and for the goal's.

    Under per-layer widths there is one class for whatever the layers keep; the goal says the least and the most of it.
    """
    unit, uniform = groups.attention, settings.widths == "uniform"
    even = range(groups.count(unit), 0, -groups.layers[unit][0].divisions)
    classes = _classes(config, groups, even) if uniform else {}
    written = (cut_config if has_stock_form(groups, goal) else per_layer_config)(config, groups, goal)
    return {
        "form": form_of(written),
        "widths": settings.widths,
        "round_to": channel_multiple(groups, Rules.of(settings)),
        "attention_unit": unit,
        f"{unit}s": groups.count(unit),
        "classes": classes,
        "never": [n for n in even if n not in chain(*classes.values())] if uniform else [],
        "goal": {
            "class": (written.architectures or [groups.family])[0],
            f"{unit}s": _span(goal, unit),
            "ffn_channels": _span(goal, "ffn_channel"),
            "sparsity": goal.sparsity(groups),
        },
    }


def _span(mask: Mask, kind: GroupKind) -> int | list[int]:
    """Return how many groups of a kind every layer keeps, or the least and the most where layers differ."""
    kept = mask.kept[kind].sum(1)
    least, most = int(kept.min()), int(kept.max())
    return least if least == most else [least, most]


def _classes(config: PretrainedConfig, groups: ModelGroups, counts: Sequence[int]) -> dict[str, list[int]]:
    classes: dict[str, list[int]] = {}
    for left in counts:
        if left == groups.count(groups.attention) or left in groups.allowed_attention:
            classes.setdefault(_class_with(config, groups, left), []).append(left)
    return classes


def _class_with(config: PretrainedConfig, groups: ModelGroups, left: int) -> str:
    """Return the class of a checkpoint that keeps so many groups of attention in every layer."""
    kept = full_mask(groups)
    kept.kept[groups.attention][:, left:] = False
    return (cut_config(config, groups, kept).architectures or [groups.family])[0]
