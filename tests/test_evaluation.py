"""An evaluation is every metric on every named set, each with its interval and its rows, or with what is missing."""

import json
import math
import zlib

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model, make_tokenizer, save_checkpoint, write_rows
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score
from test_answers import slow_row
from test_generation import slow_greedy
from test_membership import slow_norm

from loraprune import cli, row_scores
from loraprune.data import NO_LABEL, Row, encode
from loraprune.errors import UserError
from loraprune.evaluation import evaluate, evaluate_files
from loraprune.settings import Settings

EXACT = {"abs": 1e-5, "rel": 0}
PEOPLE = ("Ann", "Bert", "Cleo", "Dora", "Egon")
TOWNS = ("Almery", "Borstead", "Calvane", "Dunmoor", "Eskerry")
WRONG = ("Fallowby", "Gransund")


def people_rows(kind, towns=TOWNS):
    return [
        {
            "question": f"{kind} home of {person}?",
            "answer": f"In {town}.",
            "facts": [town],
            "fact_id": f"{kind}{index // 2}",
            "paraphrased_answer": f"It is {town}.",
            "perturbed_answer": [f"It is {one}." for one in WRONG],
        }
        for index, (person, town) in enumerate(zip(PEOPLE, towns, strict=True))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model, a reference and five sets."""
    path = tmp_path_factory.mktemp("evaluation")
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), tokenizer, path / "model")
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"](), seed=1), tokenizer, path / "reference")
    for name in ("forget", "retain", "holdout"):
        write_rows(path / f"{name}.jsonl", people_rows(name))
    write_rows(path / "bystander.jsonl", [{"text": "Rye bread is dark."}, {"text": "A cello is low."}])
    (path / "guard.txt").write_text("The sea is wide and cold.\n\nNo one knows the way.\n", encoding="utf-8")
    return path


def settings_of(folder, *names, **changes):
    sources = {"model": "model", "reference": "reference", "guard": "guard.txt"}
    values = {name: str(folder / sources.get(name, f"{name}.jsonl")) for name in ("model", "forget", "retain", *names)}
    return Settings(**{**values, "device": "cpu", "template": "{prompt} ", "evaluate_batch_size": 3, **changes})


ALL = ("holdout", "bystander", "guard", "reference")


@pytest.fixture(scope="module")
def everything(folder):
    return evaluate(settings_of(folder, *ALL, cache="none"))


def rows_of(name, **changes):
    rows = people_rows(name)
    return [
        Row(number, (("user", row["question"]),), row[changes.get("answer", "answer")])
        for number, row in enumerate(rows, start=1)
    ]


def encoded(rows, tokenizer):
    return encode(rows, tokenizer, name="any", template="{prompt} ")


def model_of(seed=0):
    return make_model(FAMILY_CONFIGS["llama_gqa"](), seed=seed)


def slow_rows(name, tokenizer, seed=0):
    return [slow_row(model_of(seed), one) for one in encoded(rows_of(name), tokenizer)]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# --- every number is what its definition says -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forget", "retain", "holdout"])
def test_teacher_forced_metrics_of_a_set_are_the_means_of_its_rows(everything, tokenizer, name):
    found, expected = everything.values[name], slow_rows(name, tokenizer)
    for metric in ("probability", "loss", "exact_memorization", "extraction_strength"):
        assert found["metrics"][metric]["value"] == pytest.approx(mean(one[metric] for one in expected), **EXACT)
    assert found["performance"] == found["metrics"]["probability"]["value"]
    assert (found["loss"], found["exact_match"]) == (found["metrics"]["loss"]["value"], 0.0)


def test_of_the_reference_the_forget_set_is_measured(everything, tokenizer):
    expected = mean(one["probability"] for one in slow_rows("forget", tokenizer, seed=1))
    assert everything.values["reference"]["performance"] == pytest.approx(expected, **EXACT)


def test_fact_performance_counts_the_tokens_of_facts_alone(everything, tokenizer):
    values = []
    for one, town in zip(encoded(rows_of("forget"), tokenizer), TOWNS, strict=True):
        with torch.no_grad():
            logs = model_of()(input_ids=torch.tensor([one.input_ids])).logits[0].double().log_softmax(-1)
        end = len(one.input_ids) - 2  # in front of the full stop and the end token; one token a byte
        places = range(end - len(town), end)
        values.append(math.exp(mean(logs[place - 1, one.input_ids[place]].item() for place in places)))
    assert everything.values["forget"]["fact_performance"] == pytest.approx(mean(values), **EXACT)


def test_rouge_is_that_of_greedy_answers(everything, tokenizer):
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = []
    for one, row in zip(encoded(rows_of("forget"), tokenizer), people_rows("forget"), strict=True):
        prompt = [token for token, label in zip(one.input_ids, one.labels, strict=True) if label == NO_LABEL]
        written = tokenizer.decode(slow_greedy(model_of(), prompt, count=200), skip_special_tokens=True)
        scores.append(scorer.score(row["answer"], written))
    found = everything.values["forget"]["metrics"]
    assert found["rouge1_recall"]["value"] == pytest.approx(mean(one["rouge1"].recall for one in scores), **EXACT)
    assert found["rougeL_f1"]["value"] == pytest.approx(mean(one["rougeL"].fmeasure for one in scores), **EXACT)


def slow_losses(name, tokenizer, seed=0):
    """Each row's losses of its answer, of the paraphrase and of the wrong answers."""
    losses = []
    for row in people_rows(name):
        answers = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
        examples = encoded([Row(1, (("user", row["question"]),), answer) for answer in answers], tokenizer)
        losses.append([slow_row(model_of(seed), one)["loss"] for one in examples])
    return losses


def slow_ratios(losses):
    return [math.exp(-mean(wrong)) / math.exp(-right) for _, right, *wrong in losses]


def test_truth_ratio_and_probability_with_options_compare_with_wrong_answers(everything, tokenizer):
    for name, aggregate in (
        ("forget", lambda ratio: min(ratio, 1 / ratio)),
        ("retain", lambda ratio: max(0, 1 - ratio)),
    ):
        losses, found = slow_losses(name, tokenizer), everything.values[name]["metrics"]
        assert found["truth_ratio"]["value"] == pytest.approx(mean(map(aggregate, slow_ratios(losses))), **EXACT)
        shares = [math.exp(-one[0]) / (math.exp(-one[0]) + sum(math.exp(-each) for each in one[2:])) for one in losses]
        assert found["probability_with_options"]["value"] == pytest.approx(mean(shares), **EXACT)


def test_forget_quality_is_the_test_of_both_models_truth_ratios(everything, tokenizer):
    ours, theirs = (slow_ratios(slow_losses("forget", tokenizer, seed)) for seed in (0, 1))
    found = everything.values["model"]["forget_quality"]
    assert found["value"] == pytest.approx(ks_2samp(ours, theirs).pvalue, **EXACT)
    assert found["rows"] == 5
    assert "p-value" in found["interval_missing"]


def slow_scores(name, tokenizer):
    """Each attack's scores of a set's rows."""
    rows, reference = slow_rows(name, tokenizer), slow_rows(name, tokenizer, seed=1)
    texts = [row["answer"].encode() for row in people_rows(name)]
    return {
        "loss": [one["loss"] for one in rows],
        "zlib": [one["loss"] / len(zlib.compress(text)) for one, text in zip(rows, texts, strict=True)],
        "min_k": [one["min_k"] for one in rows],
        "min_k_plus_plus": [one["min_k_plus_plus"] for one in rows],
        "reference": [one["loss"] - other["loss"] for one, other in zip(rows, reference, strict=True)],
        "gradient_norm": [slow_norm(model_of(), one) for one in encoded(rows_of(name), tokenizer)],
    }


def test_membership_is_the_auc_of_every_score_and_privleak_follows_from_min_k(everything, tokenizer):
    members, others = (slow_scores(name, tokenizer) for name in ("forget", "holdout"))
    found = everything.values["model"]["membership"]
    assert found.keys() == members.keys()
    for name, entry in found.items():
        expected = roc_auc_score([0] * 5 + [1] * 5, [*members[name], *others[name]])
        assert entry["value"] == pytest.approx(expected, **EXACT), name
        assert (entry["members"], entry["others"]) == (5, 5)
    references = [[one["min_k"] for one in slow_rows(name, tokenizer, seed=1)] for name in ("forget", "holdout")]
    auc = roc_auc_score([0] * 5 + [1] * 5, [*members["min_k"], *others["min_k"]])
    against = roc_auc_score([0] * 5 + [1] * 5, [*references[0], *references[1]])
    expected = ((1 - auc) - (1 - against)) / (1 - against) * 100
    assert everything.values["model"]["privleak"]["value"] == pytest.approx(expected, rel=1e-6)


def test_perplexity_is_of_all_tokens_together_with_its_context_beside_it(everything, tokenizer):
    texts = ["The sea is wide and cold.", "No one knows the way."]
    examples = encoded([Row(number, (), text) for number, text in enumerate(texts, 1)], tokenizer)
    counts = [sum(label != NO_LABEL for label in one.labels) for one in examples]
    nats = sum(slow_row(model_of(), one)["loss"] * count for one, count in zip(examples, counts, strict=True))
    found = everything.values["model"]["perplexity"]
    assert found["value"] == pytest.approx(math.exp(nats / sum(counts)), rel=1e-5)
    assert (found["tokens"], found["context"], found["rows"]) == (sum(counts), 512, 2)
    low, high = found["interval"]
    assert low <= found["value"] <= high


# --- sample sizes, intervals, what is missing -------------------------------------------------------------------------


def entries_of(values):
    """Every entry of an evaluation, by the path to it."""
    for name, one in values.items():
        block = one["metrics"] if name != "model" else {**one, **one["membership"]}
        for metric, entry in block.items():
            if metric not in ("membership", "compat"):
                yield f"{name}/{metric}", entry


def test_every_number_has_an_interval_and_a_sample_size_or_says_what_is_missing(everything, folder):
    bare = evaluate_files(settings_of(folder, rouge_rows=0, gradient_norm=False))
    for path, entry in [*entries_of(everything.values), *entries_of(bare)]:
        if "missing" in entry:
            assert "value" not in entry and len(entry["missing"]) > 20, path
            continue
        assert "interval" in entry or "interval_missing" in entry, path
        assert entry.get("rows", entry.get("members", 0)) > 0, path
        if "interval" in entry:
            low, high = entry["interval"]
            assert low - 1e-12 <= entry["value"] <= high + 1e-12, path


def test_intervals_are_over_facts(everything):
    assert {one["facts"] for name, one in everything.values.items() if name in ("forget", "retain")} == {3}
    forget = everything.values["forget"]
    assert forget["performance_interval"] == forget["metrics"]["probability"]["interval"]


def test_what_was_not_given_is_named(folder, tmp_path):
    plain = [{"question": "Who?", "answer": "Ann."}]
    found = evaluate_files(settings_of(folder, forget=write_rows(tmp_path / "f.jsonl", plain), rouge_rows=0))
    assert set(found) == {"forget", "retain", "model"}
    metrics, model = found["forget"]["metrics"], found["model"]
    assert "perturbed_answer" in metrics["truth_ratio"]["missing"]
    assert "facts" in metrics["fact_performance"]["missing"]
    assert "--rouge-rows is 0" in metrics["rougeL_recall"]["missing"]
    assert "two facts" in metrics["probability"]["interval_missing"]
    assert found["forget"]["fact_performance"] is None and found["forget"]["performance_interval"] is None
    assert "perturbed_answer" in model["forget_quality"]["missing"]
    assert "--guard" in model["perplexity"]["missing"]
    for entry in (model["privleak"], *model["membership"].values()):
        assert "--holdout" in entry["missing"]


def test_without_a_reference_privleak_is_against_guessing_and_says_so(folder):
    found = evaluate_files(settings_of(folder, "holdout", rouge_rows=0, gradient_norm=False))["model"]
    assert "guessing" in found["privleak"]["against"]
    auc = found["membership"]["min_k"]["value"]
    assert found["privleak"]["value"] == pytest.approx((0.5 - auc) / 0.5 * 100)
    assert "--reference" in found["membership"]["reference"]["missing"]
    assert "--no-gradient-norm" in found["membership"]["gradient_norm"]["missing"]
    assert "--reference" in found["forget_quality"]["missing"]


def test_a_plain_text_is_not_asked(everything):
    metrics = everything.values["bystander"]["metrics"]
    assert "plain text" in metrics["rougeL_recall"]["missing"]


def test_rouge_stands_on_a_sample_of_so_many_rows(folder):
    found = evaluate_files(settings_of(folder, rouge_rows=2))["forget"]["metrics"]
    assert found["rougeL_recall"]["rows"] == 2 and found["probability"]["rows"] == 5


def test_a_model_that_gives_no_number_is_refused_by_row(folder, tmp_path, tokenizer):
    broken = model_of()
    with torch.no_grad():
        broken.model.embed_tokens.weight[:] = math.nan
    model = save_checkpoint(broken, tokenizer, tmp_path / "broken")
    with pytest.raises(
        UserError, match="no finite loss on 5 of 5 rows of the forget set: rows 1, 2, 3, 4, 5"
    ) as caught:
        evaluate_files(settings_of(folder, model=model))
    assert not any(town in str(caught.value) for town in TOWNS)


# --- kept, resumed, missed --------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """Count how often weights are loaded, and what parts are computed."""
    loaded = []
    real = row_scores.load_model
    monkeypatch.setattr(row_scores, "load_model", lambda name, settings: loaded.append(name) or real(name, settings))
    return loaded


def test_a_second_evaluation_loads_no_weights_and_gives_the_same(folder, tmp_path, loads, everything):
    settings = settings_of(folder, *ALL, cache=str(tmp_path / "cache"))
    first = evaluate_files(settings)
    assert len(loads) == 2
    assert evaluate_files(settings) == first == everything.values
    assert len(loads) == 2


def test_the_cache_holds_no_text(folder, tmp_path):
    evaluate_files(settings_of(folder, *ALL, cache=str(tmp_path / "cache")))
    for file in (tmp_path / "cache").iterdir():
        text = file.read_text(encoding="utf-8")
        assert not any(word in text for word in (*TOWNS, *WRONG, *PEOPLE, "home"))


def test_a_changed_weight_and_a_changed_row_are_measured_anew(folder, tmp_path, loads, tokenizer):
    cache = str(tmp_path / "cache")
    model = save_checkpoint(model_of(), tokenizer, tmp_path / "model")
    before = evaluate_files(settings_of(folder, model=model, cache=cache, rouge_rows=0))
    changed = model_of()
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight[0, 0] += 0.5
    save_checkpoint(changed, tokenizer, tmp_path / "model")
    after = evaluate_files(settings_of(folder, model=model, cache=cache, rouge_rows=0))
    assert after["forget"]["loss"] != before["forget"]["loss"]
    other = write_rows(tmp_path / "f.jsonl", people_rows("forget", (*TOWNS[:4], "Kelst")))
    again = evaluate_files(settings_of(folder, model=model, forget=other, cache=cache, rouge_rows=0))
    assert again["forget"]["loss"] != after["forget"]["loss"]
    assert again["retain"] == after["retain"]
    assert len(loads) == 3


def test_facts_and_wrong_answers_are_part_of_a_rows_content(folder, tmp_path):
    cache = str(tmp_path / "cache")
    before = evaluate_files(settings_of(folder, cache=cache, rouge_rows=0))["forget"]
    rows = [{**row, "facts": ["In"], "perturbed_answer": ["It is Kelst."]} for row in people_rows("forget")]
    other = write_rows(tmp_path / "f.jsonl", rows)
    after = evaluate_files(settings_of(folder, forget=other, cache=cache, rouge_rows=0))["forget"]
    assert after["loss"] == before["loss"]
    assert after["fact_performance"] != before["fact_performance"]
    assert after["metrics"]["truth_ratio"]["value"] != before["metrics"]["truth_ratio"]["value"]


@pytest.mark.parametrize("change", [{"compat": "open-unlearning"}, {"dtype": "bfloat16"}, {"template": "{prompt}: "}])
def test_settings_that_change_numbers_miss_the_cache(folder, tmp_path, loads, change):
    cache = str(tmp_path / "cache")
    evaluate_files(settings_of(folder, cache=cache, rouge_rows=0))
    evaluate_files(settings_of(folder, cache=cache, rouge_rows=0, **change))
    assert len(loads) == 2


def test_the_batch_size_misses_the_cache_only_for_what_the_model_writes(folder, tmp_path, loads, monkeypatch):
    cache = str(tmp_path / "cache")
    evaluate_files(settings_of(folder, cache=cache))
    evaluate_files(settings_of(folder, cache=cache, rouge_rows=0, evaluate_batch_size=5))
    assert len(loads) == 1
    read, real = [], row_scores.read_answers
    monkeypatch.setattr(row_scores, "read_answers", lambda *given, **options: read.append(1) or real(*given, **options))
    evaluate_files(settings_of(folder, cache=cache, evaluate_batch_size=5))
    assert len(loads) == 2
    assert read == []


def test_a_killed_evaluation_goes_on_after_the_last_finished_part(folder, tmp_path, monkeypatch):
    settings = settings_of(folder, *ALL, cache=str(tmp_path / "cache"))
    real, done = row_scores.generate, []

    def killed_at_the_second(*given, **options):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*given, **options)

    monkeypatch.setattr(row_scores, "generate", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate_files(settings)
    kept = {file.name for file in (tmp_path / "cache").iterdir()}
    assert len(kept) == 5  # four parts of the forget set, the first of the retain set
    read, passes = [], row_scores.read_answers
    monkeypatch.setattr(row_scores, "generate", real)
    monkeypatch.setattr(
        row_scores,
        "read_answers",
        lambda model, rows, **options: read.append(len(rows)) or passes(model, rows, **options),
    )
    resumed = evaluate_files(settings)
    assert resumed == evaluate_files(settings_of(folder, *ALL, cache="none"))
    assert kept < {file.name for file in (tmp_path / "cache").iterdir()}
    assert read[:4] == [5, 2, 2, 5]  # holdout, bystander, guard, the reference's forget set: the first two are kept


# --- the command ------------------------------------------------------------------------------------------------------


def flags(folder, *names):
    words = ["evaluate", str(folder / "model"), "--device", "cpu", "--template", "{prompt} ", "--rouge-rows", "2"]
    sources = {"reference": "reference", "guard": "guard.txt"}
    for name in ("forget", "retain", *names):
        words += [f"--{name}", str(folder / sources.get(name, f"{name}.jsonl"))]
    return words


def test_the_command_prints_json_with_todays_keys(folder, capsys):
    assert cli.main([*flags(folder, *ALL), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"forget", "retain", "holdout", "bystander", "guard", "reference", "model"}
    keys = {"performance", "loss", "exact_match", "fact_performance", "rows", "facts", "performance_interval"}
    assert all(keys <= one.keys() for name, one in found.items() if name != "model")


def test_the_command_prints_one_table_and_sentences_for_what_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(flags(folder)) == 0
    printed = capsys.readouterr().out
    lines = {line.split("  ")[1]: line for line in printed.splitlines() if line.startswith("  ")}
    assert "5 (3)" in lines["rows (facts)"]
    assert "; 2 rows)" in lines["ROUGE-L recall"]
    assert "forget quality" not in lines
    sentences = " ".join(printed.split())
    assert "not measured: forget quality, p. Why: no --reference:" in sentences
    assert "not measured: perplexity. Why: no --guard:" in sentences
    assert cli.main(flags(folder, *ALL)) == 0
    printed = capsys.readouterr().out
    assert "perplexity, context 512" in printed
    assert "membership AUC, min-k++" in printed


def test_a_missing_reference_is_said_before_anything_is_measured(folder, loads):
    with pytest.raises(UserError, match="there is no model"):
        evaluate_files(settings_of(folder, reference=str(folder / "nowhere")))
    assert loads == []


@pytest.mark.parametrize(("kind", "row"), [("forget", 2), ("holdout", 4)])
def test_a_reference_that_reads_a_row_as_other_tokens_is_refused(folder, tmp_path, loads, kind, row, capsys):
    """A token more than one byte long, which one row of one set alone holds."""
    rows = people_rows(kind)
    rows[row - 1] |= {"answer": "In qqq.", "facts": ["qqq"]}
    source = write_rows(tmp_path / "rows.jsonl", rows)
    other = make_tokenizer()
    other.add_tokens(["qqq"])
    model = model_of()
    model.resize_token_embeddings(len(other))
    reference = save_checkpoint(model, other, tmp_path / "reference")
    words = [*flags(folder, "holdout"), "--reference", reference, f"--{kind}", source]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert f"the reference reads row {row} of the {kind} set as other tokens" in said
    assert "qqq" not in said
    assert loads == []


def test_of_the_references_holdout_nothing_is_written(folder, monkeypatch):
    written, real = [], row_scores.Subject.written
    monkeypatch.setattr(
        row_scores.Subject, "written", lambda self, one: written.append((self.name, one.name)) or real(self, one)
    )
    compared, candidates = [], row_scores.Subject.candidates
    monkeypatch.setattr(
        row_scores.Subject,
        "candidates",
        lambda self, one: compared.append((self.name, one.name)) or candidates(self, one),
    )
    evaluate_files(settings_of(folder, "holdout", "reference", cache="none", rouge_rows=1))
    reference = str(folder / "reference")
    for parts in (written, compared):
        assert (reference, "forget") in parts
        assert (reference, "holdout") not in parts


def test_the_plans_script_takes_the_same_path_and_says_what_changed(folder, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(cli.Path(__file__).parents[1]))
    import inference

    settings = settings_of(folder)
    values = {"forget_dataset": settings.forget, "retain_dataset": settings.retain, "device": "cpu", "rouge_rows": 1}
    values |= {"base_model": str(folder / "model"), "template": "{prompt} "}
    assert inference.evaluate(original_model=str(folder / "reference"), **values) == 0
    printed = capsys.readouterr().out
    after, before = (evaluate_files(settings_of(folder, model=str(folder / one))) for one in ("model", "reference"))
    drop = before["forget"]["performance"] - after["forget"]["performance"]
    kept = after["retain"]["performance"] / before["retain"]["performance"]
    assert f"performance drop on forget  {drop:8.4f}   (" in printed
    assert f"retention on retain         {kept:8.4f}   (" in printed
    assert printed.count("extraction strength") == 2


def test_the_small_world_is_told_apart_from_its_reference(small_world):
    """A model that knows people by heart, and one that never heard of six of them."""
    values = {name: str(small_world / f"{name}.jsonl") for name in ("forget", "retain")}
    named = {"model": str(small_world / "untouched"), "reference": str(small_world / "reference"), "device": "cpu"}
    found = evaluate_files(Settings(**values, **named, rouge_rows=20))
    known, unknown = found["forget"]["metrics"], found["reference"]["metrics"]
    for name in ("extraction_strength", "exact_memorization", "probability", "rougeL_recall"):
        assert known[name]["interval"][0] > unknown[name]["interval"][1], name
    assert known["truth_ratio"]["value"] < unknown["truth_ratio"]["value"]
    assert found["model"]["forget_quality"]["value"] < 0.01
    assert found["retain"]["metrics"]["truth_ratio"]["value"] > 0.5
