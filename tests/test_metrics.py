"""Metrics: every formula on numbers whose answer is known by hand, and on published ones.

The golden rows are the first of open-unlearning's log of Llama-3.2-1B trained on all of TOFU, forget10: what that code
wrote for each row, from the losses that it wrote beside it.
"""

import json
import math

import numpy as np
import pytest

from loraprune.metrics import (
    UTILITY_PARTS,
    exact_memorization,
    extraction_strength,
    forget_drop,
    forget_quality,
    membership_auc,
    min_k,
    min_k_plus_plus,
    model_utility,
    perplexity,
    privleak,
    probability,
    probability_with_options,
    retention,
    truth_ratio,
    truth_ratio_of_forgotten,
    truth_ratio_of_kept,
    unlearning_efficiency,
    zlib_ratio,
)

EXACT = {"rel": 1e-12, "abs": 0}


# --- how well answers are known ---------------------------------------------------------------------------------------


def test_a_probability_is_the_geometric_mean_of_the_tokens_probabilities():
    tokens = [0.5, 0.25, 0.125]
    loss = -sum(map(math.log, tokens)) / 3
    assert probability([loss, 0.0]) == pytest.approx([0.25, 1.0], **EXACT)


def test_a_probability_among_options_is_the_right_ones_part_of_all():
    assert probability_with_options([0.2, 0.5], [[0.1, 0.1], [0.0, 0.0]]) == pytest.approx([0.5, 1.0], rel=1e-9)
    assert probability_with_options([0.0], [[0.0, 0.0]]) == [0.0]
    assert probability_with_options([0.2], [[0.1, 0.1]], epsilon=0) == [0.5]


def test_exact_memorization_is_the_share_of_right_tokens():
    assert exact_memorization([[True, False, True, True], [False], [True]]) == pytest.approx([0.75, 0.0, 1.0])
    assert np.isnan(exact_memorization([[]])[0])


@pytest.mark.parametrize(
    ("right", "strength"),
    [
        ([1, 1, 1, 1], 1.0),
        ([0, 1, 1, 1], 0.75),
        ([1, 1, 0, 1], 0.25),  # only what follows the last mistake counts
        ([1, 1, 1, 0], 0.25),  # nothing right at the end: 1 / t
        ([0], 1.0),
        ([], 0.0),
    ],
)
def test_extraction_strength_is_the_part_of_the_answer_that_the_model_completes_by_itself(right, strength):
    assert extraction_strength([right])[0] == strength


def test_perplexity_is_e_to_the_mean_loss():
    assert perplexity(10 * math.log(8), 10) == pytest.approx(8.0, **EXACT)
    with pytest.raises(ValueError, match="no tokens"):
        perplexity(0.0, 0)


def test_no_rows_have_no_value():
    with pytest.raises(ValueError, match="no rows"):
        probability([])


# --- truth ratio ------------------------------------------------------------------------------------------------------


def test_a_truth_ratio_is_the_wrong_answers_geometric_mean_over_the_right_one():
    wrong = -np.log([[0.4, 0.1], [0.1, 0.1]])
    assert truth_ratio(-np.log([0.1, 0.4]), wrong) == pytest.approx([2.0, 0.25], rel=1e-8)
    assert truth_ratio(-np.log([0.1, 0.4]), wrong, epsilon=0) == pytest.approx([2.0, 0.25], **EXACT)


def test_the_forgotten_are_best_at_one_and_the_kept_at_zero():
    assert truth_ratio_of_forgotten([1.0, 2.0, 0.5], epsilon=0) == pytest.approx(2 / 3, **EXACT)
    assert truth_ratio_of_forgotten([0.0]) == 0.0
    assert truth_ratio_of_kept([0.0, 0.25, 3.0]) == pytest.approx((1 + 0.75 + 0) / 3, **EXACT)


def test_forget_quality_is_one_for_the_same_ratios_and_exact_for_few():
    assert forget_quality([1, 2, 3], [1, 2, 3]) == 1.0
    assert forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20, **EXACT)  # 2 of the C(6, 3) orders


def test_model_utility_is_a_harmonic_mean_of_all_nine_and_no_less():
    parts = dict.fromkeys(UTILITY_PARTS, 0.5)
    assert model_utility(parts) == pytest.approx(0.5, **EXACT)
    assert model_utility({**parts, "retain_rouge": 0.25}) == pytest.approx(9 / (8 * 2 + 4), **EXACT)
    assert model_utility({**parts, "retain_rouge": 0.0}) == 0.0
    with pytest.raises(ValueError, match="needs world_facts_truth"):
        model_utility({name: 0.5 for name in UTILITY_PARTS if name != "world_facts_truth"})


# --- membership -------------------------------------------------------------------------------------------------------


def test_min_k_is_the_mean_loss_of_the_least_likely_tokens():
    values = [-1.0, -5.0, -2.0, -4.0, -3.0]
    assert min_k(values) == 4.5  # two of five
    assert min_k(values, share=0.6) == 4.0
    assert min_k([-7.0, -1.0]) == 7.0  # at least one


def test_min_k_plus_plus_counts_in_standard_deviations():
    assert min_k_plus_plus([-1.0, -8.0], means=[-1.0, -2.0], variances=[4.0, 9.0], share=0.5) == 2.0
    flat = min_k_plus_plus([-1.0], means=[-2.0], variances=[0.0], share=1.0)
    assert flat == pytest.approx(-1000.0, **EXACT)  # a variance is 1e-6 at least


def test_members_have_the_lower_scores():
    assert membership_auc([1, 2], [3, 4]) == 1.0
    assert membership_auc([3, 4], [1, 2]) == 0.0
    assert membership_auc([1, 3], [2, 4]) == 0.75
    assert membership_auc([1, 1], [1, 1]) == 0.5


def test_privleak_is_zero_for_the_references_auc_and_negative_for_what_looks_trained_on():
    assert privleak(0.4, 0.4) == pytest.approx(0.0, abs=1e-12)
    assert privleak(1.0, 0.5) == pytest.approx(-100.0, rel=1e-8)
    assert privleak(0.25, 0.5) == pytest.approx(50.0, rel=1e-8)
    assert privleak(0.25) == privleak(0.25, 0.5)


# --- golden rows ------------------------------------------------------------------------------------------------------

PARAPHRASED = [2.1236655712127686, 4.0802459716796875, 1.8195452690124512]
WRONG = [
    [3.2159554958343506, 3.3368217945098877, 3.9964749813079834, 3.956535577774048, 3.4876792430877686],
    [2.553802013397217, 3.7975659370422363, 4.202922344207764, 4.541799545288086, 4.645479202270508],
    [1.8201698064804077, 1.7314852476119995, 0.9532123804092407, 1.5519890785217285, 0.8636642694473267],
]
TRUTH_RATIO = [0.22877235607506727, 1.1410309060495547, 1.5456447108752083]
REAL_AUTHORS = [0.0013971979497000575, 0.001015357323922217, 0.0126970699056983]
REAL_AUTHORS_WRONG = [
    [0.0001564862031955272, 0.0007517680060118437, 0.0005040870746597648],
    [0.03117542713880539, 0.0017011812888085842, 4.038908446091227e-05],
    [0.0034088371321558952, 0.009318149648606777, 3.8275007682386786e-05],
]
NORMALISED = [0.4973049969462697, 0.029922984297357923, 0.49866092423706365]
LOSSES = [0.05043640360236168, 0.012385929003357887, 0.03276846185326576]
PROBABILITIES = [0.9508143663406372, 0.9876905083656311, 0.9677625894546509]  # float32
ANSWER, ZLIB = "The author's full name is Hsiao Yun-Hwa.", 0.001050758408382535


def test_golden_rows_come_out_as_published():
    assert truth_ratio(PARAPHRASED, WRONG) == pytest.approx(TRUTH_RATIO, **EXACT)
    assert probability_with_options(REAL_AUTHORS, REAL_AUTHORS_WRONG) == pytest.approx(NORMALISED, **EXACT)
    assert probability(LOSSES) == pytest.approx(PROBABILITIES, rel=1e-7)
    assert zlib_ratio(LOSSES[0], ANSWER) == pytest.approx(ZLIB, **EXACT)
    assert privleak(0.99665, 0.38261249999999997) == pytest.approx(-99.45739100654656, **EXACT)
    assert privleak(0.38261249999999997) == pytest.approx(23.477499995304495, **EXACT)


def test_golden_parts_give_the_published_utility():
    """All nine, as the log gives them."""
    parts = [0.8706601643562317, 0.7932626474213142, 0.5179621870037618]
    parts += [0.4135646438190353, 0.797, 0.5273262603457551, 0.43633082577309573, 0.827920227920228, 0.6201053693945934]
    utility = model_utility(dict(zip(UTILITY_PARTS, parts, strict=True)))
    assert utility == pytest.approx(0.5991534707368931, **EXACT)


def scores(log, metric, side=None):
    values = (log[metric][side] if side else log[metric])["value_by_index"]
    return [row["score"] for row in values.values()]


def test_golden_logs_of_open_unlearning(shared_data):
    folder = shared_data / "tofu-logs-open-unlearning"
    full, retain = [json.loads(path.read_text()) for path in sorted(folder.glob("*_TOFU_EVAL.json"))]
    quality = forget_quality(scores(full, "forget_truth_ratio"), scores(retain, "forget_truth_ratio"))
    assert quality == pytest.approx(3.9054713571083378e-22, **EXACT)
    auc, reference = [
        membership_auc(scores(log, "mia_min_k", "forget"), scores(log, "mia_min_k", "holdout"))
        for log in (full, retain)
    ]
    assert auc == pytest.approx(0.99665, **EXACT)
    assert privleak(auc, reference) == pytest.approx(-99.45739100654656, **EXACT)
    assert truth_ratio_of_forgotten(scores(full, "forget_truth_ratio")) == pytest.approx(0.475563896242435, **EXACT)
    assert truth_ratio_of_kept(scores(full, "retain_Truth_Ratio")) == pytest.approx(0.5179621870037618, **EXACT)


# --- the plan's own ---------------------------------------------------------------------------------------------------


def test_a_forget_drop_is_a_difference_of_performances():
    assert forget_drop(0.75, 0.25) == 0.5
    assert forget_drop(0.25, 0.75) == -0.5


def test_retention_is_a_ratio_and_may_exceed_one():
    assert retention(0.8, 0.6) == pytest.approx(0.75)
    assert retention(0.5, 0.6) == pytest.approx(1.2)


def test_nothing_known_before_has_no_retention():
    with pytest.raises(ValueError, match="P_before is 0"):
        retention(0.0, 0.4)


def test_efficiency_divides_the_drop_by_what_it_cost():
    assert unlearning_efficiency(0.5, 0.75, 10.0, 1000) == {
        "forget_per_retain": pytest.approx(2.0),
        "forget_per_second": pytest.approx(0.05),
        "forget_per_removed_parameter": pytest.approx(0.0005),
    }


@pytest.mark.parametrize("kept", [0.995, 1.0, 1.3])
def test_a_loss_below_one_percent_counts_as_one_percent(kept):
    assert unlearning_efficiency(0.5, kept, 1.0, 1)["forget_per_retain"] == pytest.approx(50.0)


@pytest.mark.parametrize("nothing", [None, 0])
def test_a_rate_without_a_denominator_is_none(nothing):
    rates = unlearning_efficiency(0.5, 0.9, nothing, nothing)
    assert rates["forget_per_second"] is None
    assert rates["forget_per_removed_parameter"] is None
