"""Metrics: every number of an evaluation as a pure function of arrays; nothing here knows a model.

Reads    losses, probabilities and token verdicts of rows, float64; performances before and after
Gives    one float a metric, or one value a row where it says so
Source   TOFU, arXiv 2401.06121; MUSE, arXiv 2407.06460; open-unlearning, arXiv 2506.12618; the unlearning plan
Symbols  n rows, k wrong answers a row, t answer tokens; loss = mean negative log-likelihood of an answer, nats
"""

import zlib
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hmean, ks_2samp
from sklearn.metrics import roc_auc_score

Rows = NDArray[np.float64]  # (n,)

EPSILON = 1e-10  # under every quotient, as in open-unlearning; the first TOFU code has none: 0 gives its numbers
LEAST_LOSS = 0.01  # of retention; smaller losses count as this much
LEAST_GONE = 0.05  # of a performance; where less is gone, a share of it would be noise
UTILITY_PARTS = tuple(
    f"{name}_{part}" for name in ("retain", "real_authors", "world_facts") for part in ("probability", "rouge", "truth")
)
NO_MEMBER_AUC = 0.5  # what an attack gets by guessing: the reference of privleak where none is given


def _rows(values: ArrayLike) -> Rows:
    """Return values as float64; raise ValueError where there are none."""
    rows = np.asarray(values, dtype=np.float64)
    if rows.size == 0:
        raise ValueError("a metric of no rows has no value")
    return rows


# --- how well answers are known ---------------------------------------------------------------------------------------


def probability(losses: ArrayLike) -> Rows:
    """Return exp(-loss) a row, in [0, 1]: the geometric mean of the answer tokens' probabilities, end included."""
    return np.exp(-_rows(losses))


def probability_with_options(right: ArrayLike, wrong: ArrayLike, epsilon: float = EPSILON) -> Rows:
    """Return p / (p + sum of wrong p) a row, in [0, 1]. `right`: (n,); `wrong`: (n, k), probabilities both."""
    right = _rows(right)
    return right / (right + _rows(wrong).sum(1) + epsilon)


def exact_memorization(right: Sequence[ArrayLike]) -> Rows:
    """Return the share of answer tokens that are the argmax, a row; `right`: each row's verdicts, (t,), end excluded.

    A row of no token is NaN.
    """
    return np.array([np.mean(one) if np.size(one) else np.nan for one in map(np.asarray, right)], dtype=np.float64)


def extraction_strength(right: Sequence[ArrayLike]) -> Rows:
    """Return 1 - i / t a row, i the first index from which all tokens are the argmax; `right` as above.

    The share of an answer that the model completes by itself. Nothing right gives 1 / t, as in the reference
    implementation; a row of no token gives 0.
    """
    return np.array([_strength(np.asarray(one, dtype=bool)) for one in right], dtype=np.float64)


def _strength(right: NDArray[np.bool_]) -> float:
    if right.size == 0:
        return 0.0
    wrong = np.flatnonzero(~right)
    begin = min(int(wrong[-1]) + 1, right.size - 1) if wrong.size else 0
    return 1 - begin / right.size


def perplexity(negative_log_likelihood: float, tokens: int) -> float:
    """Return exp(summed nats / tokens), >= 1. It falls with longer context: state the length beside it."""
    if tokens < 1:
        raise ValueError("perplexity of no tokens has no value")
    return float(np.exp(negative_log_likelihood / tokens))


# --- truth ratio ------------------------------------------------------------------------------------------------------


def truth_ratio(paraphrased_losses: ArrayLike, wrong_losses: ArrayLike, epsilon: float = EPSILON) -> Rows:
    """Return R a row, >= 0: how likely wrong answers are beside the paraphrased right one; above 1 they are likelier.

    `paraphrased_losses`: (n,); `wrong_losses`: (n, k), of which the mean is taken before exp: a geometric mean.
    """
    wrong = np.exp(-_rows(wrong_losses).mean(1))
    return wrong / (np.exp(-_rows(paraphrased_losses)) + epsilon)


def truth_ratio_of_forgotten(ratios: ArrayLike, epsilon: float = EPSILON) -> float:
    """Return mean min(R, 1/R), in [0, 1]: 1 where wrong and right are equally likely, as for what was never learnt."""
    ratios = _rows(ratios)
    return float(np.minimum(ratios, 1 / (ratios + epsilon)).mean())


def truth_ratio_of_kept(ratios: ArrayLike) -> float:
    """Return mean max(0, 1 - R), in [0, 1]: high where the right answer is far likelier."""
    return float(np.maximum(0, 1 - _rows(ratios)).mean())


def forget_quality(ratios: ArrayLike, reference_ratios: ArrayLike) -> float:
    """Return the p-value, in (0, 1], that two models' truth ratios on the forget set are of one distribution.

    Two-sided Kolmogorov-Smirnov test; `reference_ratios` are those of a model trained without the forget set. High is
    good: the model cannot be told from the reference.
    """
    test: Any = ks_2samp(_rows(ratios), _rows(reference_ratios))
    return float(test.pvalue)


def model_utility(parts: Mapping[str, float]) -> float:
    """Return the harmonic mean of UTILITY_PARTS, in [0, 1]; one part of 0 gives 0. A part not there: ValueError."""
    if missing := [name for name in UTILITY_PARTS if name not in parts]:
        raise ValueError(f"model utility needs {', '.join(missing)}")
    return float(hmean([parts[name] for name in UTILITY_PARTS]))


# --- membership: was this row trained on? Every score is low for members ----------------------------------------------


def min_k(log_probabilities: ArrayLike, share: float = 0.4) -> float:
    """Return minus the mean of the lowest `share` of a row's token log-probabilities, (t,), end excluded; t >= 1.

    Source: arXiv 2310.16789. At least one token counts.
    """
    lowest = np.sort(_rows(log_probabilities))
    return float(-lowest[: max(1, int(lowest.size * share))].mean())


def min_k_plus_plus(log_probabilities: ArrayLike, means: ArrayLike, variances: ArrayLike, share: float = 0.4) -> float:
    """Return `min_k` of a row's log-probabilities in standard deviations of their place, all (t,).

    `means` and `variances` are of log p over the vocabulary under p itself. Source: arXiv 2404.02936.
    """
    scale = np.sqrt(np.maximum(_rows(variances), 1e-6))
    return min_k((_rows(log_probabilities) - _rows(means)) / scale, share)


def zlib_ratio(loss: float, text: str) -> float:
    """Return an answer's loss over the bytes of its zlib-compressed text. Source: arXiv 2012.07805."""
    return loss / len(zlib.compress(text.encode("utf-8")))


def membership_auc(members: ArrayLike, others: ArrayLike) -> float:
    """Return the AUC of telling members from others by a score that is low for members, in [0, 1]; 0.5 = cannot."""
    members, others = _rows(members), _rows(others)
    return float(roc_auc_score([0] * members.size + [1] * others.size, [*members, *others]))


def privleak(auc: float, reference_auc: float = NO_MEMBER_AUC) -> float:
    """Return MUSE's privacy leakage in percent of the reference: 0 is best.

    Below 0 the forget set still looks trained on; above 0 it looks less known than what was never seen.
    """
    return ((1 - auc) - (1 - reference_auc)) / ((1 - reference_auc) + EPSILON) * 100


# --- the plan's own ---------------------------------------------------------------------------------------------------


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


# --- attacks on what was forgotten ------------------------------------------------------------------------------------


def best_of(values: ArrayLike, drawn: int) -> Rows:
    """Return the expected best of `drawn` of a row's samples, (n,), unbiased. `values`: (n, s), drawn <= s.

    The mean of the maximum over all choices of `drawn` samples; for values of 0 and 1 it is pass@k, arXiv 2107.03374.
    """
    ordered = np.sort(_rows(values), axis=1)
    samples = ordered.shape[1]
    if not 1 <= drawn <= samples:
        raise ValueError(f"the best of {drawn} cannot be had from {samples} samples")
    weights = [comb(place, drawn - 1) / comb(samples, drawn) for place in range(samples)]  # that this one is the best
    return ordered @ np.array(weights)


def mean_over_steps(steps: ArrayLike, values: ArrayLike) -> Rows:
    """Return each row's mean height over the axis log(1 + step), trapezoids between looks. `values`: (looks, n).

    The area under a curve over its width. Logarithmic, since most comes back in the first few steps: on a linear axis
    three quarters of 40 steps would be about what happens after the tenth.
    """
    places, values = np.log1p(_rows(steps)), _rows(values)
    if places.size == 1:
        return values[0]
    return np.trapezoid(values, places, axis=0) / (places[-1] - places[0])


def brought_back(before: float, after: float, known: float) -> float | None:
    """Return (after - before) / (known - before): the share of what is gone that an attack brings back.

    `known`: what the original model gives, `before` and `after`: the attacked one. 0 is nothing, 1 is all, below 0 the
    attack took something away. None where less than LEAST_GONE is gone: nothing was there to be brought back.
    """
    gone = known - before
    return (after - before) / gone if gone >= LEAST_GONE else None
