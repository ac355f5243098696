"""Schedule: how much may be gone by step t.

Reads    settings, the number of the training step
Gives    the sparsity that may be reached now, or that nothing is pruned now
Source   cubic schedule, arXiv 1710.01878, eq. 1; LoRAPrune's released code, for `released`
Symbols  t round, n rounds
"""

from loraprune.settings import Settings


def cubic(done: int, rounds: int) -> float:
    """Return the share of the final sparsity that may be gone after `done` of `rounds` pruning steps, in [0, 1]."""
    return 1.0 - (1.0 - min(done / rounds, 1.0)) ** 3


def pruning_round(step: int, warmup_steps: int, prune_every: int, prune_rounds: int) -> int | None:
    """Return which pruning step (1, 2, ...) follows training step `step` (1, 2, ...), or None."""
    since = step - warmup_steps
    if since < prune_every or since % prune_every or since // prune_every > prune_rounds:
        return None
    return since // prune_every


def planned_sparsity(step: int, settings: Settings) -> float | None:
    """Return the sparsity that may be reached after training step `step` (1, 2, ...), None where nothing is pruned.

    `cubic` prunes after warm-up, every `prune_every` steps, and ends at the goal. `released` counts from the step
    before, prunes at multiples of `prune_every`, and only while it is above the beginning and below the goal.
    """
    goal, begin = settings.sparsity or settings.max_sparsity, settings.initial_sparsity
    if settings.schedule == "cubic":
        turn = pruning_round(step, settings.warmup_steps, settings.prune_every, settings.prune_rounds)
        return None if turn is None else begin + (goal - begin) * cubic(turn, settings.prune_rounds)
    since, length = step - 1 - settings.warmup_steps, settings.prune_every * settings.prune_rounds
    if (step - 1) % settings.prune_every or not 0 < since <= length:
        return None
    planned = goal + (begin - goal) * (1 - since / length) ** 3
    return planned if begin < planned < goal else None


def last_sparsity(settings: Settings) -> float:
    """Return the sparsity at which the schedule ends: the goal, or what the released code stops at below it."""
    steps = range(1, settings.warmup_steps + settings.prune_every * settings.prune_rounds + 2)
    planned = (planned_sparsity(step, settings) for step in steps)
    return max((one for one in planned if one is not None), default=settings.initial_sparsity)


def learning_rate_factor(step: int, warmup_steps: int, main_steps: int, finish_steps: int) -> float:
    """Return the learning rate's factor: a linear rise, a plateau while pruning, a linear fall during recovery."""
    rise = max(1, warmup_steps // 2)
    if step < main_steps:
        return min(1.0, (step + 1) / rise)
    return max(0.05, 1.0 - (step - main_steps) / max(1, finish_steps))
