"""Metrics: what an unlearning run achieved, in four numbers.

Reads    performances before and after, seconds, removed parameters
Gives    forget_drop, retention, unlearning_efficiency
Source   the unlearning plan, section 6; the floor of 0.01 under 1 - retention keeps a perfect run finite
Symbols  P = performance, in [0, 1]
"""

LEAST_LOSS = 0.01  # of retention; smaller losses count as this much


def forget_drop(before: float, after: float) -> float:
    """Return P_before - P_after on the forget set, in [-1, 1]; negative when the set is known better than before."""
    return before - after


def retention(before: float, after: float) -> float:
    """Return P_after / P_before on a retain set, >= 0; above 1 when the set is known better than before."""
    if before == 0:
        raise ValueError("retention is P_after / P_before, and P_before is 0: the model knew nothing of this set")
    return after / before


def forget_per_retain(forget_drop: float, retention: float) -> float:
    """Return the forget drop per lost retention; a loss below 0.01 counts as 0.01."""
    return forget_drop / max(1 - retention, LEAST_LOSS)


def unlearning_efficiency(
    forget_drop: float, retention: float, seconds: float | None, removed_parameters: int | None
) -> dict[str, float | None]:
    """Return the forget drop per lost retention, per second and per removed parameter.

    A rate whose denominator is unknown or 0 is None.
    """
    return {
        "forget_per_retain": forget_per_retain(forget_drop, retention),
        "forget_per_second": forget_drop / seconds if seconds else None,
        "forget_per_removed_parameter": forget_drop / removed_parameters if removed_parameters else None,
    }
