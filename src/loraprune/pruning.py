"""Pruning: one step of it on a live model, from the scores to an accepted mask, or back.

Reads    averaged sensitivities, a budget, and a look at the model that tells which limits it keeps
Gives    the decision that was accepted; the model's mask and adapter follow it
Source   the unlearning plan's local_prune and unlearning_prune; LoRAPrune, arXiv 2305.18403, algorithm 1
Symbols  ratio = the part of all parameters that may be gone after this step
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from loraprune.decision import Scores, decide_compression, decide_unlearning
from loraprune.mask import LiveMask, mask_of
from loraprune.records import Decision, Limit, Look, Mask
from loraprune.rules import Rules, smallest_share
from loraprune.sensitivity import SensitivityDict
from loraprune.steering import Limits

ROOM: tuple[Limit, ...] = ("room",)
Rescale = Callable[[Mask], Mask]  # gives the mask of a decision the factors that keep the size of outputs; rescale.py
Record = Callable[..., None]  # record("propose", look, removed=3): one line of events.jsonl


def _no_record(kind: str, look: Look | None = None, **values: object) -> None:
    """Keep no record."""


@dataclass(frozen=True)
class ModelState:
    """A point to come back to: the mask and every trained weight."""

    mask: Mask
    trained: Mapping[str, Tensor]

    def equals(self, other: "ModelState") -> bool:
        """Say whether both are the same model, bit for bit."""
        pairs = [(one, other.trained[name]) for name, one in self.trained.items()]
        ours, theirs = self.mask.tensors(), other.mask.tensors()
        pairs += [(one, theirs[name]) for name, one in ours.items() if name in theirs]
        return ours.keys() == theirs.keys() and all(torch.equal(one, another.to(one.device)) for one, another in pairs)


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
    rescale: Rescale | None = None,
) -> Decision:
    """Mask the groups that go at this step and return them.

    `ratio` and `target_ratio`, in [0, 1]: removed / all parameters allowed after this step and at the end. With both
    sets scored, groups go by both, as the rules say; with the retain set alone, the groups of lowest sensitivity. Early
    stop: nothing goes once `forget_performance` is at or below `forget_goal`. `rescale` says what survivors are
    multiplied by.
    """
    live, rules = mask_of(model), rules or Rules()
    if forget_performance is not None and forget_goal is not None and forget_performance <= forget_goal:
        return Decision((), "target")
    decision = _decide(live, sensitivity_dict, min(ratio, target_ratio), rules, step)
    mask = live.value.without(decision.removals)
    live.set(rescale(mask) if rescale is not None and decision.removals else mask)
    return decision


def _decide(live: LiveMask, sensitivity_dict: SensitivityDict, ratio: float, rules: Rules, step: int) -> Decision:
    retain, total = sensitivity_dict.retain.values(), live.groups.total_parameters
    budget = round(ratio * total) - live.value.removed_parameters(live.groups)
    if sensitivity_dict.forget.totals is None:
        fraction = ratio if rules.of_groups else None
        worth = total if rules.of_groups else budget
        return decide_compression(
            retain, live.value, live.groups, budget=worth, rules=rules, step=step, fraction=fraction
        )
    forget = sensitivity_dict.forget.values()
    return decide_unlearning(forget, retain, live.value, live.groups, budget=budget, rules=rules, step=step)


def unlearning_prune(
    model: nn.Module,
    forget_dict: Scores | None,
    retain_dict: Scores,
    threshold: float,
    min_retain_performance: float,
    *,
    look: Callable[[], Look],
    ratio: float,
    limits: Limits | None = None,
    repair: Callable[[], int] | None = None,
    roll_back: Callable[[], Look] | None = None,
    looked: Look | None = None,
    forget_performance: float | None = None,
    forget_goal: float | None = None,
    rules: Rules | None = None,
    step: int = 0,
    rescale: Rescale | None = None,
    record: Record = _no_record,
) -> Decision:
    """Prune by both scores while the model keeps its limits, retention >= `min_retain_performance` the first of them.

    `look` measures the model as it is; `limits` adds a guard, ceilings and the band's lower end, and room for
    forgetting where `looked` says how the model came in. A step that breaks one gets `repair`, which returns how many
    training steps it took; still broken, `roll_back` (default: the model as it came in) undoes it and half the step is
    tried, until the smallest fails: then nothing goes and the decision is ended by the limit's name. It has a look, and
    pruning may go on later, where the step only took forgetting's room, which may be all of it and more and gets no
    repair, and where the model came in broken and was rolled back to where no step was tried. `forget_dict` None: plain
    compression. `ratio`: removed / all parameters allowed afterwards, or of every layer's groups where the rules
    count these. `threshold` holds where the rules do not let all groups go.
    """
    live, rules = mask_of(model), replace(rules or Rules(), threshold=threshold)
    limits = replace(limits or Limits(), min_retain_performance=min_retain_performance)
    scores, roll_back = SensitivityDict.of(forget_dict, retain_dict), roll_back or _back_to_now(model, look)
    begun = 0.0 if rules.of_groups else live.value.sparsity(live.groups)
    allowance, smallest = ratio - begun, smallest_share(live.groups, rules, live.value)
    came_in_broken = looked is not None and bool(limits.broken(looked))
    while True:
        goal = {"forget_performance": forget_performance, "forget_goal": forget_goal}
        decision = local_prune(model, scores, begun + allowance, 1.0, rules=rules, step=step, rescale=rescale, **goal)
        found = look()
        held = limits.of_cut(looked) if decision.removals and looked is not None else limits
        broken = held.broken(found)
        removed, allowed = len(decision.removals), begun + allowance
        record("propose", found, step=step, removed=removed, allowed=allowed, broken=broken)
        if broken and broken != ROOM and repair is not None:  # which brings back some of what was forgotten
            steps, found = repair(), look()
            broken = held.broken(found)
            record("recover", found, step=step, steps=steps, broken=broken)
        if not broken:
            record("accept", found, step=step, removed=removed)
            return _ended(decision, found, forget_goal)
        good = looked = roll_back()
        record("roll_back", good, step=step, broken=broken, tried=found.sparsity)
        if not removed:
            return _ended(decision, good, forget_goal)  # training alone broke the limit: there is no step to halve
        allowance /= 2
        if allowance < smallest:
            goes_on = broken == ROOM or came_in_broken  # the room may not be needed next time
            return Decision((), broken[0], good if goes_on else None)
        came_in_broken = False  # from where it stands now the next step is tried


def _ended(decision: Decision, look: Look, forget_goal: float | None) -> Decision:
    """Return the decision with the model it left; the target it ended at may be lost by a repair or a roll-back."""
    lost = decision.ended_by == "target" and forget_goal is not None and (look.forget or 0.0) > forget_goal
    return replace(decision, look=look, ended_by="budget" if lost else decision.ended_by)


def _back_to_now(model: nn.Module, look: Callable[[], Look]) -> Callable[[], Look]:
    """Return what brings the model back to where it is at this moment."""
    state, looked = take_state(model), look()

    def roll_back() -> Look:
        restore_state(model, state)
        return looked

    return roll_back
