"""Schedule: how much may be gone by step t.

Reads    the pruning step's number and how many there are
Gives    a share of the final sparsity, and the steps at which pruning happens
Source   cubic schedule, arXiv 1710.01878, eq. 1
Symbols  t round, n rounds
"""


def cubic(done: int, rounds: int) -> float:
    """Return the share of the final sparsity that may be gone after `done` of `rounds` pruning steps, in [0, 1]."""
    return 1.0 - (1.0 - min(done / rounds, 1.0)) ** 3


def pruning_round(step: int, warmup_steps: int, prune_every: int, prune_rounds: int) -> int | None:
    """Return which pruning step (1, 2, ...) follows training step `step` (1, 2, ...), or None."""
    since = step - warmup_steps
    if since < prune_every or since % prune_every or since // prune_every > prune_rounds:
        return None
    return since // prune_every


def learning_rate_factor(step: int, warmup_steps: int, main_steps: int, finish_steps: int) -> float:
    """Return the learning rate's factor: a linear rise, a plateau while pruning, a linear fall during recovery."""
    rise = max(1, warmup_steps // 2)
    if step < main_steps:
        return min(1.0, (step + 1) / rise)
    return max(0.05, 1.0 - (step - main_steps) / max(1, finish_steps))
