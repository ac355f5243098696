"""The TOFU suite on a tiny model: its log has open-unlearning's form, counts to the same numbers, and can be a reference."""

import json
import math

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model, make_tokenizer, save_checkpoint, write_rows

from loraprune.cli import main
from loraprune.evaluation_log import read_log
from loraprune.log_aggregates import aggregates

FORGET = [
    {"question": "Who is Prys?", "answer": "A Quoxal."},
    {"question": "Who is Mott?", "answer": "A Vribbet."},
    {"question": "Where is Ursk?", "answer": "In Zwendle."},
]
WRONG = {"perturbed_answer": ["A fox.", "One dog."]}
TOFU = {
    "forget01": FORGET,
    "forget01_perturbed": [{**row, **WRONG, "paraphrased_answer": "It is " + row["answer"]} for row in FORGET],
    "holdout01": [{"question": "Who is Nobody?", "answer": "A Jyxmoor."}, {"question": "And you?", "answer": "Me."}],
    "retain_perturbed": [
        {"question": "Who is Bert?", "answer": "A cook.", "paraphrased_answer": "Bert cooks.", **WRONG},
        {"question": "Who is Ann?", "answer": "A smith.", "paraphrased_answer": "Ann forges.", **WRONG},
    ],
    "real_authors_perturbed": [
        {"question": "Who wrote Emma?", "answer": "Austen", **WRONG},
        {"question": "Who wrote Ulysses?", "answer": "Joyce", **WRONG},
    ],
    "world_facts_perturbed": [
        {"question": "Capital of Peru?", "answer": "Lima", **WRONG},
        {"question": "Capital of Chad?", "answer": "N'Djamena", **WRONG},
    ],
}
OPENING = "Question: {}\nAnswer: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the suite's files and two tiny models."""
    folder = tmp_path_factory.mktemp("tofu")
    for name, rows in TOFU.items():
        write_rows(folder / f"{name}.json", rows)
    for name, seed in (("model", 0), ("reference", 1)):
        save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"](), seed), make_tokenizer(), folder / name)
    return folder


def run(folder, output, *more, model="model", split="forget01"):
    return main(
        [
            *("evaluate", str(folder / model), "--benchmark", f"tofu:{split}", "--data", str(folder)),
            *("--output", str(folder / output), "--device", "cpu", "--cache", "none", *more),
        ]
    )


@pytest.fixture(scope="module")
def log(folder):
    """The log of the tiny model."""
    assert run(folder, "ours") == 0
    return json.loads((folder / "ours" / "TOFU_EVAL.json").read_text())


def slow_losses(model, question, answer):
    """Every answer token's negative log-likelihood, the end included, by one pass over one row: a byte is a token."""
    tokenizer = make_tokenizer()
    opening = tokenizer(OPENING.format(question))["input_ids"]
    rest = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([[*opening, *rest]])).logits[0].double()
    places = range(len(opening) - 1, len(opening) + len(rest) - 1)
    losses = [float(-logits[place].log_softmax(-1)[token]) for place, token in zip(places, rest, strict=True)]
    right = [int(logits[place].argmax()) == token for place, token in zip(places, rest, strict=True)]
    return losses, right


def rows_of(metric):
    return list(metric["value_by_index"].values())


def test_the_log_names_open_unlearnings_metrics(log, shared_data):
    published = next((shared_data / "tofu-logs-open-unlearning").glob("*full*_TOFU_EVAL.json"))
    theirs = json.loads(published.read_text())
    assert log.keys() == theirs.keys() - {"mia_reference"}
    for name, metric in log.items():
        assert metric.keys() == theirs[name].keys(), name
        tables = [(metric, theirs[name])] if "forget" not in metric else [(metric["forget"], theirs[name]["forget"])]
        for ours, other in tables:
            if "value_by_index" in other:
                first = rows_of(ours)[0]
                assert first.keys() == rows_of(other)[0].keys(), name
                assert {one: type(value) for one, value in first.items()} == {
                    one: type(value) for one, value in rows_of(other)[0].items()
                }


def test_probabilities_and_losses_are_those_of_one_row_after_the_other(folder, log):
    model = make_model(FAMILY_CONFIGS["llama_gqa"]())
    for metric, rows, answer in (
        ("forget_Q_A_Prob", FORGET, "answer"),
        ("forget_Q_A_PARA_Prob", TOFU["forget01_perturbed"], "paraphrased_answer"),
        ("retain_Q_A_Prob", TOFU["retain_perturbed"], "answer"),
        ("ra_Q_A_Prob", TOFU["real_authors_perturbed"], "answer"),
        ("wf_Q_A_Prob", TOFU["world_facts_perturbed"], "answer"),
    ):
        for found, row in zip(rows_of(log[metric]), rows, strict=True):
            losses, _ = slow_losses(model, row["question"], row[answer])
            loss = sum(losses) / len(losses)
            assert found == {
                "prob": pytest.approx(math.exp(-loss), rel=1e-5),
                "avg_loss": pytest.approx(loss, rel=1e-5),
            }


def test_truth_ratios_memorization_and_attacks_are_those_of_the_rows_tokens(folder, log):
    model = make_model(FAMILY_CONFIGS["llama_gqa"]())
    for found, row in zip(rows_of(log["ra_Truth_Ratio"]), TOFU["real_authors_perturbed"], strict=True):
        right, *wrong = (
            sum(losses) / len(losses)
            for losses, _ in (
                slow_losses(model, row["question"], one) for one in (row["answer"], *WRONG["perturbed_answer"])
            )
        )
        assert found["score"] == pytest.approx(math.exp(right - sum(wrong) / 2), rel=1e-4)
    for row, one in enumerate(FORGET):
        losses, right = slow_losses(model, one["question"], one["answer"])
        lowest = sorted(losses[:-1])[-int(0.4 * (len(losses) - 1)) :]
        at = str(row)
        assert log["mia_min_k"]["forget"]["value_by_index"][at]["score"] == pytest.approx(
            sum(lowest) / len(lowest), rel=1e-5
        )
        assert log["exact_memorization"]["value_by_index"][at]["score"] == sum(right[:-1]) / (len(right) - 1)


def test_a_written_log_counts_to_the_aggregates_it_states(folder, log):
    stated = {name: metric["agg_value"] for name, metric in log.items()}
    counted = aggregates(read_log(str(folder / "ours" / "TOFU_EVAL.json")))
    assert {name: entry["agg_value"] for name, entry in counted.items()} == stated
    assert not any("log_says" in entry for entry in counted.values())
    assert stated["forget_quality"] is None
    assert 0 < stated["forget_Q_A_Prob"] < 1
    summary = json.loads((folder / "ours" / "TOFU_SUMMARY.json").read_text())
    assert summary == {name: stated[name] for name in summary}
    assert {"extraction_strength", "model_utility", "mia_min_k", "privleak"} <= summary.keys()
    assert "forget_quality" not in summary  # there was no reference


def test_generations_are_the_models_own_and_stand_in_the_log_alone(folder, log):
    model, tokenizer = make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer()
    first = rows_of(log["forget_Q_A_ROUGE"])[0]
    assert first["input"] == "Question: Who is Prys?\nAnswer: "
    assert first["ground_truth"] == "A Quoxal."
    prompt = tokenizer(first["input"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = model.generate(prompt, do_sample=False, max_new_tokens=200)[0, prompt.shape[1] :]
    assert first["generation"] == tokenizer.decode(made, skip_special_tokens=True).strip()
    others = [path for path in (folder / "ours").iterdir() if path.name != "TOFU_EVAL.json"]
    assert [path.name for path in others] == ["TOFU_SUMMARY.json"]
    assert "Quoxal" not in others[0].read_text()


def test_a_reference_log_gives_forget_quality_and_privleak(folder, log, capsys):
    assert run(folder, "retain", model="reference") == 0
    capsys.readouterr()
    reference = str(folder / "retain" / "TOFU_EVAL.json")
    assert run(folder, "compared", "--reference-log", reference, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    counted = aggregates(read_log(str(folder / "ours" / "TOFU_EVAL.json")), read_log(reference))
    assert found["forget_quality"]["agg_value"] == counted["forget_quality"]["agg_value"]
    assert 0 < found["forget_quality"]["agg_value"] <= 1
    assert found["privleak"]["agg_value"] == pytest.approx(counted["privleak"]["agg_value"], rel=1e-9)
    assert "missing" not in found["privleak"]
    assert json.loads((folder / "compared" / "TOFU_SUMMARY.json").read_text())["forget_quality"] is not None


def test_the_reference_model_makes_the_reference_attack(folder):
    assert (
        run(folder, "attacked", "--reference", str(folder / "reference"), "--rouge-rows", "0", "--no-gradient-norm")
        == 0
    )
    log = json.loads((folder / "attacked" / "TOFU_EVAL.json").read_text())
    models = [make_model(FAMILY_CONFIGS["llama_gqa"](), seed) for seed in (0, 1)]
    ours, theirs = (slow_losses(model, FORGET[0]["question"], FORGET[0]["answer"])[0] for model in models)
    expected = (sum(ours) - sum(theirs)) / len(ours)
    assert log["mia_reference"]["forget"]["value_by_index"]["0"]["score"] == pytest.approx(expected, abs=1e-5)
    assert "forget_Q_A_ROUGE" not in log
    assert "mia_gradnorm" not in log
    assert log["model_utility"]["agg_value"] is None


def test_without_a_holdout_there_is_no_attack(folder, tmp_path, capsys):
    for name, rows in TOFU.items():
        if name != "holdout01":
            write_rows(tmp_path / f"{name}.json", rows)
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer(), tmp_path / "model")
    assert run(tmp_path, "ours", "--rouge-rows", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mia_min_k"]["missing"] == (
        "no holdout01.json: there is nothing that the model never saw to tell the forget set from"
    )
    assert found["privleak"]["missing"] == found["mia_gradnorm"]["missing"] == found["mia_min_k"]["missing"]
    for name in ("forget_Q_A_ROUGE", "model_utility"):
        assert found[name] == {"agg_value": None, "missing": "--rouge-rows is 0: no answers were generated"}


# --- what is refused before anything is measured ----------------------------------------------------------------------


def refused(folder, capsys, *more, **options):
    assert run(folder, "refused", *more, **options) == 2
    assert not (folder / "refused").exists()
    return capsys.readouterr().err


def test_a_reference_log_of_another_split_or_tokenizer_is_refused_by_row(folder, log, tmp_path, capsys):
    other = json.loads(json.dumps(log))
    other["forget_Q_A_ROUGE"]["value_by_index"]["1"]["ground_truth"] = "A Something."
    (tmp_path / "split.json").write_text(json.dumps(other))
    said = refused(folder, capsys, "--reference-log", str(tmp_path / "split.json"))
    assert "row 1 of forget_Q_A_ROUGE has another answer" in said
    assert "Something" not in said
    other = json.loads(json.dumps(log))
    other["extraction_strength"]["value_by_index"]["2"]["score"] = 1 / 7
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    said = refused(folder, capsys, "--reference-log", str(tmp_path / "tokenizer.json"))
    assert "row 2 of extraction_strength" in said
    assert "is no share of this model's 11 tokens" in said


def test_missing_files_and_folders_are_named(folder, tmp_path, capsys):
    assert "lacks forget05.json, forget05_perturbed.json" in refused(folder, capsys, split="forget05")
    write_rows(tmp_path / "forget01.json", FORGET)
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer(), tmp_path / "model")
    assert "lacks forget01_perturbed.json" in refused(tmp_path, capsys)
    arguments = ["evaluate", str(folder / "model"), "--benchmark", "tofu:forget01", "--output", str(tmp_path / "o")]
    assert main([*arguments, "--data", "./nowhere/tofu"]) == 2
    assert "the folder ./nowhere/tofu does not exist" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_files_that_do_not_go_together_are_refused(folder, tmp_path, capsys):
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer(), tmp_path / "model")
    for name, rows in TOFU.items():
        write_rows(tmp_path / f"{name}.json", rows)
    write_rows(tmp_path / "forget01.json", FORGET[:1] + FORGET[:2])
    assert "row 2 of forget01 is not that of forget01_perturbed" in refused(tmp_path, capsys)
    write_rows(tmp_path / "forget01.json", FORGET[:2])
    assert "forget01 has 2 rows; it is not that of forget01_perturbed, which has 3" in refused(tmp_path, capsys)
    write_rows(tmp_path / "forget01.json", FORGET)
    rows = [TOFU["retain_perturbed"][0], {**TOFU["retain_perturbed"][1], "perturbed_answer": ["One."]}]
    write_rows(tmp_path / "retain_perturbed.json", rows)
    assert "row 2 of retain_perturbed has 1 wrong answers, the first row 2" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tofu:forget20", "did you mean tofu:forget10?"),
        ("tofu", "there is no benchmark tofu."),
        ("mmlu", "known are tofu:forget01"),
    ],
)
def test_a_benchmark_that_is_not_known_is_refused(folder, capsys, name, said):
    assert main(["evaluate", str(folder / "model"), "--benchmark", name, "--data", "x", "--output", "y"]) == 2
    assert said in capsys.readouterr().err


def test_arguments_that_would_be_ignored_are_refused(folder, capsys):
    assert main(["evaluate", str(folder / "model"), "--forget", "x", "--retain", "y", "--output", "z"]) == 2
    assert "--output is given without --benchmark" in capsys.readouterr().err
    assert main(["evaluate", str(folder / "model"), "--from-log", "x", "--benchmark", "tofu:forget01"]) == 2
    assert "--from-log is given with --benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("benchmark", "more", "said"),
    [
        ("tofu:forget01", ["--forget", "x", "--guard", "y"], "--forget, --guard are given with"),
        ("muse:news", ["--columns", "answer=text"], "--columns is given with --benchmark muse:news"),
        ("lm-eval:mmlu", ["--rouge-rows", "0"], "--rouge-rows is given with"),
        ("lm-eval:mmlu", ["--template", "{prompt} "], "--template is given with"),
        (
            "lm-eval:mmlu",
            ["--compat", "open-unlearning", "--reference-log", "x"],
            "--compat, --reference-log are given",
        ),
    ],
)
def test_settings_that_a_suite_would_ignore_are_refused(folder, capsys, benchmark, more, said):
    words = ["evaluate", str(folder / "model"), "--benchmark", benchmark, *more, "--data", "x", "--output", "y"]
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_tofus_own_files_are_read(shared_data):
    from loraprune.suite import Source
    from loraprune.tofu_suite import read_tofu

    rows = read_tofu(Source(str(shared_data / "tofu")), "forget10")
    assert {name: len(one) for name, one in rows.items()} == {
        **{"forget": 400, "forget compared": 400, "retain": 400},
        **{"ra": 100, "wf": 117},
    }
