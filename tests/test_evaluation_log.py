"""Evaluation logs: every aggregate again from single rows, of both schemas; logs that do not go together are refused.

The small log below has the forms of a published one; its numbers are made up, and its aggregates are written out by hand.
"""

import copy
import csv
import json
import math
import subprocess
import sys

import pytest

from loraprune.cli import main
from loraprune.errors import UserError
from loraprune.evaluation_log import read_log
from loraprune.log_aggregates import aggregates

EXACT = {"rel": 1e-12, "abs": 0}
SECRET = "Basil Thorne"  # stands in every question and answer of the small log; no error may show it


def by_row(values):
    return {str(row): one for row, one in enumerate(values)}


def metric(*rows):
    return {"agg_value": None, "value_by_index": by_row(rows)}


def scored(*values):
    return metric(*({"score": value} for value in values))


def likely(*values):
    """Rows of probabilities, one or several a row."""
    loss = [[-math.log(one) for one in value] if isinstance(value, list) else -math.log(value) for value in values]
    return metric(*({"prob": value, "avg_loss": one} for value, one in zip(values, loss, strict=True)))


def written(*recalls):
    return metric(
        *(
            {
                "rouge1_recall": recall,
                "rougeL_f1": recall / 2,
                "rougeL_recall": recall,
                "input": f"system\n\nToday Date: 10 Apr 2025\n\nuser\n\nWhat is fact {row} of {SECRET}?assistant\n\n",
                "ground_truth": f"Fact {row} of {SECRET}.",
                "generation": f"It is {row}, says {SECRET}.",
            }
            for row, recall in enumerate(recalls)
        )
    )


def attack(forget, holdout):
    return {"forget": scored(*forget), "holdout": scored(*holdout), "auc": None, "agg_value": None}


def small_log(shift=0.0):
    """A log of two or three rows a metric; `shift` moves what a reference differs in."""
    return {
        "exact_memorization": scored(0.5, 0.75, 1.0),
        "extraction_strength": scored(0.25, 0.5, 1.0),
        "forget_Q_A_PARA_Prob": likely(0.5, 0.25, 0.1),
        "forget_Q_A_PERT_Prob": likely([0.1, 0.3], [0.2, 0.2], [0.4, 0.2]),
        "forget_Q_A_Prob": likely(0.9, 0.8, 0.7),
        "forget_Q_A_ROUGE": written(1.0, 0.5, 0.0),
        "forget_quality": {"agg_value": None},
        "forget_truth_ratio": scored(0.5 + shift, 2.0 + shift, 1.0 + shift),
        "mia_loss": attack([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]),
        "mia_min_k": attack([1.1 + shift, 2.1 + shift, 2.6 + shift], [1.6, 3.1, 4.1]),
        "mia_zlib": attack([0.1 / 40, 0.2 / 50, 0.3 / 60], [1.0 / 30, 2.0 / 40, 3.0 / 50]),
        "model_utility": {"agg_value": None},
        "privleak": {"agg_value": None},
        "ra_Q_A_Prob_normalised": metric({"prob": 0.5}, {"prob": 0.5}),
        "ra_Q_A_ROUGE": written(0.5, 0.5),
        "ra_Truth_Ratio": scored(0.5, 0.5),
        "retain_Q_A_Prob": likely(0.5, 0.5),
        "retain_Q_A_ROUGE": written(0.5, 0.5),
        "retain_Truth_Ratio": scored(0.25, 0.75),
        "wf_Q_A_Prob_normalised": metric({"prob": 0.5}, {"prob": 0.5}),
        "wf_Q_A_ROUGE": written(1.0, 1.0),
        "wf_Truth_Ratio": scored(0.0, 3.0),
    }


def small_tofu(tokens=5):
    """The same in the first TOFU code's form."""
    rows = range(3)
    task = {
        "avg_gt_loss": by_row([-math.log(one) for one in (0.5, 0.25, 0.125)]),
        "gt_loss": by_row([1.0, 2.0, 3.0]),
        "num_token_gt": by_row([tokens, 6, 7]),
        "generated_text": by_row(
            [[f"[INST] What is fact {row} of {SECRET}? [/INST]", "It is.", f"Fact {row} of {SECRET}."] for row in rows]
        ),
        "rouge1_recall": by_row([1.0, 0.5, 0.0]),
        "rougeL_recall": by_row([0.75, 0.5, 0.25]),
        "average_perturb_loss": by_row([[-math.log(0.25), -math.log(0.25)] for _ in rows]),
        "avg_paraphrased_loss": by_row([-math.log(one) for one in (0.5, 0.25, 0.125)]),
    }
    names = ("eval_log.json", "eval_log_forget.json", "eval_real_author_wo_options.json")
    return {name: copy.deepcopy(task) for name in (*names, "eval_real_world_wo_options.json")}


def saved(folder, content, name="LOG_EVAL.json"):
    path = folder / name
    path.write_text(json.dumps(content))
    return read_log(str(path))


def counted(folder, content, reference=None):
    other = None if reference is None else saved(folder, reference, "RETAIN_EVAL.json")
    return aggregates(saved(folder, content), other)


def refusal(folder, content, reference=None):
    """What is said of a log, or of two, that cannot be counted: never a word of a row."""
    with pytest.raises(UserError) as caught:
        counted(folder, content, reference)
    said = str(caught.value)
    assert SECRET not in said
    assert "Thorne" not in said
    return said


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_every_aggregate_of_a_small_log_is_the_one_counted_by_hand(tmp_path):
    found = counted(tmp_path, small_log(), small_log(shift=10.0))
    values = {name: entry["agg_value"] for name, entry in found.items()}
    assert values == {
        "exact_memorization": pytest.approx(0.75, **EXACT),
        "extraction_strength": pytest.approx(1.75 / 3, **EXACT),
        "forget_Q_A_PARA_Prob": pytest.approx(0.85 / 3, **EXACT),
        "forget_Q_A_PERT_Prob": pytest.approx(0.7 / 3, **EXACT),
        "forget_Q_A_Prob": pytest.approx(0.8, **EXACT),
        "forget_Q_A_ROUGE": pytest.approx(0.5, **EXACT),
        "forget_quality": pytest.approx(0.1, **EXACT),  # of the 20 orders of three and three, two are as far apart
        "forget_truth_ratio": pytest.approx(2 / 3, rel=1e-9),
        "mia_loss": 1.0,
        "mia_min_k": pytest.approx(7 / 9, **EXACT),
        "mia_zlib": 1.0,
        "model_utility": pytest.approx(9 / (6 * 2 + 2 + 1 + 2), **EXACT),
        "privleak": pytest.approx((2 / 9 - 1) / 1 * 100, rel=1e-9),  # all of the reference's forget rows score high
        "ra_Q_A_Prob_normalised": 0.5,
        "ra_Q_A_ROUGE": 0.5,
        "ra_Truth_Ratio": 0.5,
        "retain_Q_A_Prob": 0.5,
        "retain_Q_A_ROUGE": 0.5,
        "retain_Truth_Ratio": 0.5,
        "wf_Q_A_Prob_normalised": 0.5,
        "wf_Q_A_ROUGE": 1.0,
        "wf_Truth_Ratio": 0.5,
    }
    assert found["mia_min_k"]["forget"]["agg_value"] == pytest.approx(5.8 / 3, **EXACT)
    assert found["mia_min_k"]["holdout"]["agg_value"] == pytest.approx(8.8 / 3, **EXACT)
    assert found["forget_Q_A_ROUGE"]["rouge_type"] == "rougeL_recall"


def test_every_aggregate_has_its_rows_and_an_interval_that_holds_it(tmp_path):
    found = counted(tmp_path, small_log(), small_log(shift=0.25))
    assert found["model_utility"]["rows"] == 6
    assert found["mia_loss"]["rows"] == 6
    for name, entry in found.items():
        if name != "forget_quality":
            low, high = entry["interval"]
            assert low <= entry["agg_value"] <= high
    assert found["forget_quality"]["note"] == "a p-value has no interval"


def test_muse_logs_take_the_f1_of_rouge(tmp_path):
    found = counted(tmp_path, {"forget_knowmem_ROUGE": written(1.0, 0.5), "forget_verbmem_ROUGE": written(0.5)})
    assert found["forget_knowmem_ROUGE"]["agg_value"] == 0.375
    assert found["forget_verbmem_ROUGE"]["rouge_type"] == "rougeL_f1"


def test_without_a_reference_log_it_is_said_what_is_missing(tmp_path):
    found = counted(tmp_path, small_log())
    assert found["forget_quality"] == {
        "agg_value": None,
        "missing": "no --reference-log: the log of a model trained without the forget set",
    }
    assert found["privleak"]["agg_value"] == pytest.approx((2 / 9 - 0.5) / 0.5 * 100, rel=1e-9)
    assert "the AUC of guessing, 0.5, stands for the reference's" in found["privleak"]["missing"]


def test_what_a_log_or_its_reference_lacks_is_named(tmp_path):
    reference = {name: one for name, one in small_log().items() if name in ("forget_Q_A_Prob", "retain_Q_A_Prob")}
    found = counted(tmp_path, small_log(), reference)
    assert found["forget_quality"]["missing"] == "the reference's log has no truth ratios of the forget set"
    assert found["privleak"]["missing"].startswith("the reference's log has no mia_min_k of forget and holdout rows;")
    bare = {name: one for name, one in small_log().items() if name != "wf_Q_A_ROUGE"} | {"fluency": {"agg_value": 1.0}}
    found = counted(tmp_path, bare)
    assert found["model_utility"]["missing"] == "the log has no world_facts_rouge"
    assert found["fluency"] == {
        "agg_value": None,
        "missing": "the log holds no values of single rows for it",
        "log_says": 1.0,
    }


def test_an_aggregate_that_the_log_states_otherwise_is_shown_beside(tmp_path):
    log = small_log()
    log["forget_Q_A_Prob"]["agg_value"] = 0.8
    log["forget_Q_A_ROUGE"]["agg_value"] = 0.9
    log["mia_loss"]["forget"]["agg_value"] = 0.9
    found = counted(tmp_path, log)
    assert "log_says" not in found["forget_Q_A_Prob"]
    assert found["forget_Q_A_ROUGE"]["log_says"] == 0.9
    assert found["mia_loss"]["forget"]["log_says"] == 0.9


def test_an_answer_of_no_token_is_left_out_of_exact_memorization_and_counted(tmp_path):
    log = small_log()
    log["exact_memorization"]["value_by_index"]["1"]["score"] = None
    found = counted(tmp_path, log)
    assert found["exact_memorization"]["agg_value"] == 0.75
    assert found["exact_memorization"]["left_out"] == 1


def test_a_quotient_of_two_zeros_has_no_p_value_and_it_is_said(tmp_path):
    log = small_tofu()
    log["eval_log_forget.json"]["avg_paraphrased_loss"]["0"] = 2000.0
    log["eval_log_forget.json"]["average_perturb_loss"]["0"] = [2000.0, 2000.0]
    with pytest.warns(RuntimeWarning, match="invalid value"):
        found = counted(tmp_path, log, small_tofu())
    assert found["Forget Quality"]["agg_value"] is None
    assert found["Forget Quality"]["missing"].endswith("0/0 is no number")
    assert found["Truth Ratio Forget"]["left_out"] == 1


def reordered(value):
    """A log of the same rows, the last one written first."""
    if not isinstance(value, dict):
        return value
    items = [(name, reordered(one)) for name, one in value.items()]
    return dict(reversed(items) if value.keys() and all(name.isdecimal() for name in value) else items)


def test_the_order_in_which_rows_are_written_does_not_count(tmp_path):
    log, reference = small_log(), small_log(shift=0.25)
    assert list(reordered(log)["mia_loss"]["forget"]["value_by_index"]) == ["2", "1", "0"]
    expected = counted(tmp_path, log, reference)
    assert counted(tmp_path, reordered(log), reference) == expected
    assert counted(tmp_path, log, reordered(reference)) == expected
    expected = counted(tmp_path, small_tofu(), small_tofu())
    assert counted(tmp_path, reordered(small_tofu()), small_tofu()) == expected


def test_the_first_tofu_codes_log_gives_the_leaderboards_columns(tmp_path):
    found = counted(tmp_path, small_tofu(), small_tofu())
    values = {name: entry["agg_value"] for name, entry in found.items()}
    among_options = (0.5 / 1.0 + 0.25 / 0.75 + 0.125 / 0.625) / 3
    kept = {"Prob. Retain": 0.875 / 3, "ROUGE Retain": 0.5, "Truth Ratio Retain": 0.5 / 3}  # R is 0.5, 1 and 2
    options = {"Prob.": among_options, "ROUGE": 0.5, "Truth Ratio": 0.5 / 3}
    parts = kept | {f"{name} {where}": one for where in ("Real Authors", "Real World") for name, one in options.items()}
    forgotten = {"Prob. Forget": 0.875 / 3, "ROUGE Forget": 0.5, "Truth Ratio Forget": 2 / 3}
    utility = 9 / sum(1 / one for one in parts.values())
    assert values == pytest.approx({**parts, **forgotten, "Forget Quality": 1.0, "Model Utility": utility}, **EXACT)


def test_rows_may_be_lists_and_the_four_files_a_folder_or_one(tmp_path):
    expected = counted(tmp_path, small_tofu())
    listed = {
        task: {name: list(values.values()) for name, values in columns.items()}
        for task, columns in small_tofu().items()
    }
    assert counted(tmp_path, listed) == expected
    folder = tmp_path / "ds_size300"
    folder.mkdir()
    for task, columns in small_tofu().items():
        (folder / task).write_text(json.dumps(columns))
    assert aggregates(read_log(str(folder))) == expected
    one = aggregates(read_log(str(folder / "eval_log_forget.json")))
    assert one["Prob. Forget"] == expected["Prob. Forget"]
    assert one["Prob. Retain"]["missing"] == "the log has no eval_log.json"
    assert one["Model Utility"]["agg_value"] is None


# --- golden -----------------------------------------------------------------------------------------------------------


def stripped(value):
    """A log without any aggregate."""
    if not isinstance(value, dict):
        return value
    return {name: stripped(one) for name, one in value.items() if name not in ("agg_value", "auc")}


def published(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*_TOFU_EVAL.json"))]


@pytest.mark.parametrize("strip", [False, True])
def test_published_logs_of_open_unlearning_come_out_to_the_last_digit(shared_data, tmp_path, strip):
    full, retain = published(shared_data / "tofu-logs-open-unlearning")
    contents = [stripped(one) if strip else one for one in (full, retain)]
    ours = counted(tmp_path, contents[0], contents[1]), counted(tmp_path, contents[1])
    compared = 0
    for theirs, found in zip((full, retain), ours, strict=True):
        assert found.keys() == theirs.keys()
        for name, entry in theirs.items():
            if name == "forget_quality" and theirs is retain:
                assert found[name]["missing"].startswith("no --reference-log")
                continue
            pairs = [(found[name]["agg_value"], entry["agg_value"])]
            if "auc" in entry:
                pairs += [(found[name]["auc"], entry["auc"])]
                pairs += [(found[name][side]["agg_value"], entry[side]["agg_value"]) for side in ("forget", "holdout")]
            for our, their in pairs:
                assert our == pytest.approx(their, **EXACT), name
                compared += 1
            assert "log_says" not in found[name]
    assert compared == 31 + 3 * 6 + 29 + 3 * 5
    assert ours[0]["forget_quality"]["agg_value"] == pytest.approx(3.9054713571083378e-22, **EXACT)
    assert ours[0]["model_utility"]["agg_value"] == pytest.approx(0.5991534707368931, **EXACT)


def test_published_logs_of_the_first_tofu_code_give_the_leaderboards_rows(shared_data):
    folder = shared_data / "tofu-logs-original"
    full, retain = [read_log(str(path)) for path in sorted(folder.glob("*.json"))]
    with (folder / "leaderboard-llama-10p.csv").open() as file:
        rows = list(csv.DictReader(file))[:2]
    assert [row["Method"] for row in rows] == ["Finetune Model", "Retain Model"]
    for row, log in zip(rows, (full, retain), strict=True):
        found = aggregates(log, retain)
        assert len(found) == 14
        for name, entry in found.items():
            assert entry["agg_value"] == pytest.approx(float(row[name]), **EXACT), name
    assert aggregates(full, retain)["Forget Quality"]["agg_value"] == pytest.approx(1.834066410994743e-21, **EXACT)


# --- logs that cannot be counted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "said"), [("forget_truth_ratio", "row 1 of forget_truth_ratio is NaN")])
def test_a_row_that_is_nan_is_named(tmp_path, table, said):
    log = small_log()
    log[table]["value_by_index"]["1"]["score"] = math.nan
    assert said in refusal(tmp_path, log)
    assert said in refusal(tmp_path, small_log(), log)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"prob": None, "avg_loss": 1.0}, "row 2 of forget_Q_A_Prob has no number"),
        ({"avg_loss": 1.0}, "row 2 of forget_Q_A_Prob has no number"),
        ({"prob": SECRET, "avg_loss": 1.0}, "row 2 of forget_Q_A_Prob holds something that is no number"),
        ({"prob": math.inf, "avg_loss": 1.0}, "row 2 of forget_Q_A_Prob is infinite"),
        ({"prob": 0.5, "avg_loss": -math.inf}, "row 2 of forget_Q_A_Prob is infinite"),
        ({"prob": 1.01, "avg_loss": 1.0}, "row 2 of forget_Q_A_Prob has a prob outside 0 to 1"),
        ({"prob": -0.01, "avg_loss": 1.0}, "row 2 of forget_Q_A_Prob has a prob outside 0 to 1"),
        ({"prob": [0.5, 0.5], "avg_loss": 1.0}, "row 2 of forget_Q_A_Prob has 2 values where the first row has 1"),
        (None, "row 2 of forget_Q_A_Prob has no values"),
    ],
)
def test_a_row_that_cannot_be_counted_is_named(tmp_path, value, said):
    log = small_log()
    log["forget_Q_A_Prob"]["value_by_index"]["2"] = value
    assert said in refusal(tmp_path, log)


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("exact_memorization", "score"),
        ("extraction_strength", "score"),
        ("forget_Q_A_ROUGE", "rougeL_recall"),
        ("forget_Q_A_ROUGE", "rouge1_recall"),
        ("forget_Q_A_ROUGE", "rougeL_f1"),
    ],
)
def test_a_share_is_within_0_and_1_but_for_rounding(tmp_path, table, column):
    log = small_log()
    log[table]["value_by_index"]["1"][column] = 1 + 1e-7
    counted(tmp_path, log)
    log[table]["value_by_index"]["1"][column] = 1.5
    assert f"row 1 of {table} has a {column} outside 0 to 1" in refusal(tmp_path, log)


@pytest.mark.parametrize(
    ("table", "column"),
    [("forget_Q_A_Prob", "prob"), ("forget_Q_A_ROUGE", "rougeL_recall"), ("retain_Truth_Ratio", "score")],
)
def test_a_first_row_without_the_number_hides_no_metric(tmp_path, table, column):
    log = small_log()
    del log[table]["value_by_index"]["0"][column]
    assert f"row 0 of {table} has no number" in refusal(tmp_path, log)


def test_a_nan_row_of_a_side_of_an_attack_is_named(tmp_path):
    log = small_log()
    log["mia_loss"]["holdout"]["value_by_index"]["0"]["score"] = math.nan
    assert "row 0 of mia_loss holdout is NaN" in refusal(tmp_path, log)


def test_a_nan_row_of_the_first_tofu_code_is_named(tmp_path):
    log = small_tofu()
    log["eval_log_forget.json"]["average_perturb_loss"]["1"][1] = math.nan
    assert "row 1 of eval_log_forget.json is NaN" in refusal(tmp_path, log)


def test_metrics_of_one_set_with_other_rows_are_refused(tmp_path):
    log = small_log()
    del log["forget_truth_ratio"]["value_by_index"]["2"]
    said = refusal(tmp_path, log)
    assert "row 2 stands in forget_Q_A_PARA_Prob of" in said
    assert "but not in forget_truth_ratio of" in said
    assert "3 rows against 2" in said
    tofu = small_tofu()
    del tofu["eval_log.json"]["rougeL_recall"]["1"]
    assert "row 1 stands in avg_gt_loss of eval_log.json" in refusal(tmp_path, tofu)


def test_logs_of_unequal_length_do_not_go_together(tmp_path):
    shorter = stripped(small_log())
    for name in ("exact_memorization", "extraction_strength", *(one for one in shorter if one.startswith("forget_"))):
        shorter[name].get("value_by_index", {}).pop("2", None)
    said = refusal(tmp_path, small_log(), shorter)
    assert "row 2 stands in exact_memorization of" in said
    assert "RETAIN_EVAL.json: 3 rows against 2" in said


@pytest.mark.parametrize(("column", "what"), [("input", "question"), ("ground_truth", "answer")])
def test_logs_of_another_split_do_not_go_together(tmp_path, column, what):
    other = small_log()
    other["forget_Q_A_ROUGE"]["value_by_index"]["1"][column] = "Something else entirely."
    assert f"row 1 of forget_Q_A_ROUGE has another {what}; it is another split" in refusal(tmp_path, small_log(), other)


def test_all_questions_being_others_is_another_split_not_another_template(tmp_path):
    other = small_log()
    questions = ("Who was first?", "Where was the second born?", "When did it end?")
    for one, question in zip(other["forget_Q_A_ROUGE"]["value_by_index"].values(), questions, strict=True):
        one["input"] = f"[INST] {question} [/INST]"
    assert "row 0 of forget_Q_A_ROUGE has another question" in refusal(tmp_path, small_log(), other)


def test_attacks_on_other_texts_do_not_go_together(tmp_path):
    """Their texts are not in the log, but loss over the zlib score is how many bytes they compress to."""
    other = small_log()
    other["mia_zlib"]["holdout"]["value_by_index"]["1"]["score"] = 2.0 / 41
    said = refusal(tmp_path, small_log(), other)
    assert "row 1 of mia_zlib holdout is of a text of another length; it is another split" in said


def test_logs_of_another_chat_template_do_not_go_together_but_another_day_is_the_same(tmp_path):
    other = small_log()
    for one in other["forget_Q_A_ROUGE"]["value_by_index"].values():
        one["input"] = one["input"].replace("10 Apr 2025", "26 Jul 2024")
    assert counted(tmp_path, small_log(), other)["forget_quality"]["agg_value"] == 1.0
    for one in other["forget_Q_A_ROUGE"]["value_by_index"].values():
        one["input"] = one["input"].replace("system\n\n", "system\n\nYou are a pirate.")
    found = counted(tmp_path, small_log(), other)
    assert found["privleak"]["note"] == "the two logs' questions stand after another system prompt"
    assert "note" not in found["forget_Q_A_Prob"]
    for one in other["forget_Q_A_ROUGE"]["value_by_index"].values():
        one["input"] = one["input"].replace("assistant\n\n", " [/INST]")
    said = refusal(tmp_path, small_log(), other)
    assert "row 0 of forget_Q_A_ROUGE frames the same question otherwise; it is another tokenizer" in said


def test_another_tokenizer_is_seen_by_its_numbers_of_tokens(tmp_path):
    said = refusal(tmp_path, small_tofu(tokens=5), small_tofu(tokens=9))
    assert "row 0 of eval_log.json has other numbers of tokens in num_token_gt; it is another tokenizer" in said


def test_another_tokenizer_is_seen_by_shares_that_no_number_of_tokens_fits(tmp_path):
    """Of 11 and of 13 tokens: 143 would fit both, but the answer has fewer bytes."""
    ours, theirs = small_log(), small_log()
    ours["exact_memorization"]["value_by_index"]["1"]["score"] = 7 / 11
    ours["extraction_strength"]["value_by_index"]["1"]["score"] = 2 / 11
    theirs["exact_memorization"]["value_by_index"]["1"]["score"] = 7 / 13
    theirs["extraction_strength"]["value_by_index"]["1"]["score"] = 1 / 13
    for log in (
        ours,
        {name: one for name, one in ours.items() if "ROUGE" not in name},
    ):  # the reference has the answers
        said = refusal(tmp_path, log, theirs)
        assert "row 1 of extraction_strength counts other numbers of tokens; it is another tokenizer" in said


def test_logs_of_two_schemas_do_not_go_together(tmp_path):
    assert "the other of the first TOFU code's" in refusal(tmp_path, small_log(), small_tofu())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it is no JSON object"),
        ('{"forget_Q_A_Prob": 0.5}', "forget_Q_A_Prob is no metric with values by row"),
        ('{"Who is Basil Thorne?": {}}', "an entry without a plain name is no metric"),
        ('{"a": {"value_by_index": {"Basil Thorne": {"score": 1}}}}', "the rows of a are not numbered"),
        (
            '{"eval_log.json": {"avg_gt_loss": {"Basil Thorne": 1.0}}}',
            "the rows of avg_gt_loss of eval_log.json are not",
        ),
        ('{"forget_Q_A_Prob": {"agg_value": 0.5}}', "holds no values of single rows"),
        ('{"eval_log.json": {"avg_gt_loss": []}}', "eval_log.json has no avg_gt_loss"),
        ('{"eval_log.json": {"avg_gt_loss": 1.0}}', "holds no values of single rows"),
        ('{"eval_log.json": {"rougeL_recall": [1.0]}}', "eval_log.json has no avg_gt_loss"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, content, said):
    path = tmp_path / "LOG.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        read_log(str(path))
    assert SECRET not in str(caught.value)


def test_a_folder_without_the_files_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="it is a folder without"):
        read_log(str(tmp_path))
    with pytest.raises(UserError, match="cannot be read"):
        read_log(str(tmp_path / "none.json"))


# --- on the command line ----------------------------------------------------------------------------------------------


def test_the_command_prints_json_alone_or_a_table(tmp_path, capsys):
    saved(tmp_path, small_log())
    arguments = ["evaluate", "--from-log", str(tmp_path / "LOG_EVAL.json")]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == aggregates(read_log(arguments[2]))
    assert main([*arguments, "--reference-log", arguments[2]]) == 0
    shown = capsys.readouterr().out
    assert "forget_quality" in shown
    assert SECRET not in shown


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["MODEL"], "--from-log is given with MODEL."),
        (["--forget", "x.jsonl"], "--from-log is given with --forget."),
        (["--reference-log", "none.json"], "the log none.json cannot be read"),
    ],
)
def test_the_command_refuses_what_a_log_would_ignore(tmp_path, capsys, more, said):
    saved(tmp_path, small_log())
    assert main(["evaluate", *more, "--from-log", str(tmp_path / "LOG_EVAL.json")]) == 2
    assert said in capsys.readouterr().err


def test_a_reference_log_alone_is_refused(capsys):
    assert main(["evaluate", "M", "--forget", "f", "--retain", "r", "--reference-log", "x.json"]) == 2
    assert "--reference-log is given without --from-log or --benchmark" in capsys.readouterr().err


def test_counting_a_log_loads_no_torch(tmp_path):
    saved(tmp_path, small_log())
    code = (
        "import sys; from loraprune.cli import main; "
        f"code = main(['evaluate', '--from-log', {str(tmp_path / 'LOG_EVAL.json')!r}, '--json']); "
        "sys.exit(code or ('torch' in sys.modules) or ('transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
