"""Pruning: one step of it on a live model, from the scores to an accepted mask, or back.

Reads    averaged sensitivities, a budget, and a way to measure retention on the floor rows
Gives    the decision that was accepted; the model's mask and adapter follow it
Source   the unlearning plan's local_prune and unlearning_prune; LoRAPrune, arXiv 2305.18403, algorithm 1
Symbols  ratio = the part of all parameters that may be gone after this step
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from loraprune.decision import Scores, decide_compression, decide_unlearning
from loraprune.mask import LiveMask, mask_of
from loraprune.records import Decision, Mask
from loraprune.rules import Rules, smallest_step
from loraprune.sensitivity import SensitivityDict

Record = Callable[..., None]  # record("propose", removed=3): one line of events.jsonl


def _no_record(kind: str, **values: object) -> None:
    """Keep no record."""


@dataclass(frozen=True)
class ModelState:
    """A point to come back to: the mask and every trained weight."""

    mask: Mask
    trained: Mapping[str, Tensor]


def take_state(model: nn.Module) -> ModelState:
    """Return a copy of the model's mask and trained weights."""
    trained = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    return ModelState(mask_of(model).value, trained)


def restore_state(model: nn.Module, state: ModelState) -> None:
    """Put mask and trained weights back, bit for bit."""
    mask_of(model).set(state.mask)
    parameters = dict(model.named_parameters())
    for name, kept in state.trained.items():
        parameters[name].data.copy_(kept)


def local_prune(
    model: nn.Module,
    sensitivity_dict: SensitivityDict,
    ratio: float,
    target_ratio: float,
    *,
    rules: Rules | None = None,
    forget_performance: float | None = None,
    forget_goal: float | None = None,
    step: int = 0,
) -> Decision:
    """Mask the groups that go at this step and return them.

    `ratio` and `target_ratio`, in [0, 1]: removed / all parameters allowed after this step and at the end. With both
    sets scored, candidates by dual score go; with the retain set alone, the groups of lowest sensitivity. Early stop:
    nothing goes once `forget_performance` is at or below `forget_goal`.
    """
    live, rules = mask_of(model), rules or Rules()
    if forget_performance is not None and forget_goal is not None and forget_performance <= forget_goal:
        return Decision((), "target")
    budget = int(min(ratio, target_ratio) * live.groups.total_parameters) - live.value.removed_parameters(live.groups)
    decision = _decide(live, sensitivity_dict, budget, rules, step)
    live.set(live.value.without(decision.removals))
    return decision


def _decide(live: LiveMask, sensitivity_dict: SensitivityDict, budget: int, rules: Rules, step: int) -> Decision:
    retain = sensitivity_dict.retain.values()
    if sensitivity_dict.forget.totals is None:
        return decide_compression(retain, live.value, live.groups, budget=budget, rules=rules, step=step)
    forget = sensitivity_dict.forget.values()
    return decide_unlearning(forget, retain, live.value, live.groups, budget=budget, rules=rules, step=step)


def unlearning_prune(
    model: nn.Module,
    forget_dict: Scores | None,
    retain_dict: Scores,
    threshold: float,
    min_retain_performance: float,
    *,
    retention: Callable[[], float],
    ratio: float,
    repair: Callable[[], None] | None = None,
    last_good: ModelState | None = None,
    forget_performance: float | None = None,
    forget_goal: float | None = None,
    rules: Rules | None = None,
    step: int = 0,
    record: Record = _no_record,
) -> Decision:
    """Prune by dual score while retention stays at or above `min_retain_performance`; return what went.

    A step that breaks the floor gets `repair`; still broken, mask and trained weights go back to `last_good` (default:
    as the model is now) and half the step is tried, until the smallest fails: then nothing goes and the decision says
    "floor". `forget_dict` None: plain compression. `ratio`: removed / all parameters allowed after this step.
    """
    live, rules = mask_of(model), replace(rules or Rules(), threshold=threshold)
    scores = SensitivityDict.of(forget_dict, retain_dict)
    good = last_good or take_state(model)
    done = live.value.sparsity(live.groups)
    allowance = ratio - done
    smallest = smallest_step(live.groups, rules, live.value) / live.groups.total_parameters
    while True:
        decision = local_prune(
            model,
            scores,
            done + allowance,
            1.0,
            rules=rules,
            forget_performance=forget_performance,
            forget_goal=forget_goal,
            step=step,
        )
        record("propose", step=step, removed=len(decision.removals), sparsity=live.value.sparsity(live.groups))
        if _floor_holds(retention, repair, min_retain_performance, step, record):
            return decision
        restore_state(model, good)
        record("roll_back", step=step, sparsity=live.value.sparsity(live.groups))
        allowance /= 2
        if not decision.removals or allowance < smallest:
            return Decision((), "floor")


def _floor_holds(
    retention: Callable[[], float], repair: Callable[[], None] | None, floor: float, step: int, record: Record
) -> bool:
    kept = retention()
    if kept < floor and repair is not None:
        repair()
        repaired = retention()
        record("recover", step=step, retention_before=kept, retention=repaired, floor=floor)
        kept = repaired
    return kept >= floor
