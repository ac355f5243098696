"""The MUSE suite on a tiny model and tiny files in the benchmark's layout."""

import json

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model, make_tokenizer, save_checkpoint
from rouge_score.rouge_scorer import RougeScorer

from loraprune.cli import main
from loraprune.evaluation_log import read_log
from loraprune.log_aggregates import aggregates

QUESTIONS = {
    "forget_qa": [("Who fell?", "Prys Quoxal"), ("Where?", "At Zwendle")],
    "forget_qa_icl": [("Who rose?", "Ann"), ("When?", "In May")],
    "retain_qa": [("Who won?", "Bert"), ("What?", "A cup")],
    "retain_qa_icl": [("Who lost?", "Mott")],
}
WORDING = [{"prompt": "On Monday Prys", "gt": "went to Zwendle by sea."}, {"prompt": "The", "gt": "Quoxal sank."}]
TEXTS = {"forget": ["Prys fell off the Quoxal.", "It sank at night."], "holdout": ["Rain is due.", "Trains run late."]}


def write_muse(folder):
    """Lay out the files as the benchmark's repository does."""
    for name in ("knowmem", "verbmem", "privleak"):
        (folder / name).mkdir(parents=True)
    for name, pairs in QUESTIONS.items():
        rows = [{"question": question, "answer": answer} for question, answer in pairs]
        (folder / "knowmem" / f"{name}.json").write_text(json.dumps(rows))
    (folder / "verbmem" / "forget.json").write_text(json.dumps(WORDING))
    for name, texts in TEXTS.items():
        (folder / "privleak" / f"{name}.json").write_text(json.dumps(texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muse")
    write_muse(folder / "news")
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer(), folder / "model")
    return folder


def run(folder, *more, output="ours", data="news"):
    return main(
        [
            *("evaluate", str(folder / "model"), "--benchmark", "muse:news", "--data", str(folder / data)),
            *("--output", str(folder / output), "--device", "cpu", "--cache", "none", *more),
        ]
    )


@pytest.fixture(scope="module")
def log(folder):
    assert run(folder) == 0
    return json.loads((folder / "ours" / "MUSE_EVAL.json").read_text())


def rows_of(metric):
    return list(metric["value_by_index"].values())


def written(prompt, tokens):
    """What the model writes after a prompt, asked alone."""
    model, tokenizer = make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = model.generate(ids, do_sample=False, max_new_tokens=tokens)[0, ids.shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_questions_stand_behind_their_examples_and_answers_end_at_the_next_question(log):
    first = rows_of(log["forget_knowmem_ROUGE"])[0]
    shots = "Question: Who rose?\nAnswer: Ann\n\nQuestion: When?\nAnswer: In May\n\n"
    assert first["input"] == shots + "Question: Who fell?\nAnswer: "
    assert first["ground_truth"] == "Prys Quoxal"
    whole = written(first["input"], 32)
    for stop in ("\n\n", "\nQuestion", "Question:"):
        whole = whole.split(stop)[0]
    assert first["generation"] == whole.strip()
    assert "Mott" in rows_of(log["retain_knowmem_ROUGE"])[1]["input"]


def test_wording_goes_on_from_its_prompt_and_is_scored_by_f1(log):
    rows = rows_of(log["forget_verbmem_ROUGE"])
    assert [row["input"] for row in rows] == ["On Monday Prys", "The"]
    assert rows[0]["ground_truth"] == "went to Zwendle by sea."
    assert rows[0]["generation"] == written("On Monday Prys", 128).strip()
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    f1 = [scorer.score(row["ground_truth"], row["generation"])["rougeL"].fmeasure for row in rows]
    assert log["forget_verbmem_ROUGE"]["agg_value"] == pytest.approx(sum(f1) / 2)


def test_memorization_is_of_the_wording_and_attacks_are_of_whole_texts(log):
    model, tokenizer = make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer()
    prompt, text = WORDING[0]["prompt"], WORDING[0]["gt"]
    ids = torch.tensor([tokenizer(f"{prompt} {text}")["input_ids"]])
    with torch.no_grad():
        right = (model(ids).logits[0, :-1].argmax(-1) == ids[0, 1:])[len(prompt) - 1 : -1]
        whole = torch.tensor([tokenizer(TEXTS["holdout"][1])["input_ids"]])
        losses = torch.nn.functional.cross_entropy(model(whole).logits[0, :-1].double(), whole[0, 1:], reduction="none")
    assert len(right) == len(text)  # and the space, without the last
    assert rows_of(log["exact_memorization"])[0]["score"] == pytest.approx(right.double().mean().item())
    assert rows_of(log["mia_loss"]["holdout"])[1]["score"] == pytest.approx(losses.mean().item(), rel=1e-5)
    lowest = losses[:-1].sort(descending=True).values[: int(0.4 * (len(losses) - 1))]
    assert rows_of(log["mia_min_k"]["holdout"])[1]["score"] == pytest.approx(lowest.mean().item(), rel=1e-5)


def test_the_log_counts_to_what_it_states_and_is_a_reference(folder, log, capsys):
    path = str(folder / "ours" / "MUSE_EVAL.json")
    counted = aggregates(read_log(path))
    assert {name: entry["agg_value"] for name, entry in counted.items()} == {
        name: metric["agg_value"] for name, metric in log.items()
    }
    capsys.readouterr()
    assert run(folder, "--reference-log", path, "--rouge-rows", "0", "--json", output="again") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["privleak"]["agg_value"] == pytest.approx(0.0, abs=1e-6)
    assert found["forget_knowmem_ROUGE"]["missing"] == "--rouge-rows is 0: no answers were generated"
    assert "forget_quality" not in found
    summary = json.loads((folder / "ours" / "MUSE_SUMMARY.json").read_text())
    assert {"forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "retain_knowmem_ROUGE", "privleak"} <= summary.keys()


def test_a_chat_model_sees_the_examples_as_turns(folder, tmp_path):
    write_muse(tmp_path / "news")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), tokenizer, tmp_path / "model")
    assert run(tmp_path) == 0
    log = json.loads((tmp_path / "ours" / "MUSE_EVAL.json").read_text())
    assert rows_of(log["forget_knowmem_ROUGE"])[0]["input"] == (
        "user: Who rose?\nassistant: Ann\nuser: When?\nassistant: In May\nuser: Who fell?\nassistant: "
    )


def test_missing_files_are_named(folder, tmp_path, capsys):
    write_muse(tmp_path / "news")
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer(), tmp_path / "model")
    (tmp_path / "news" / "privleak" / "holdout.json").unlink()
    assert run(tmp_path) == 2
    assert "lacks privleak/holdout.json" in capsys.readouterr().err


def test_texts_in_a_column_are_the_same(folder, log, tmp_path):
    write_muse(tmp_path / "news")
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer(), tmp_path / "model")
    for name, texts in TEXTS.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "news" / "privleak" / f"{name}.json").write_text(rows)
    assert run(tmp_path, "--rouge-rows", "0", "--no-gradient-norm") == 0
    found = json.loads((tmp_path / "ours" / "MUSE_EVAL.json").read_text())
    assert found["mia_loss"] == log["mia_loss"]
