"""Tasks of lm-eval on a tiny model: a local task with local data is scored as its definition says."""

import importlib.util
import json

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model, make_tokenizer, save_checkpoint, write_rows

from loraprune.cli import main

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, of the extra bench")
ROWS = [
    {"question": "Sky?", "choices": ["blue", "iron"], "label": 0},
    {"question": "Snow?", "choices": ["coal", "cold"], "label": 1},
    {"question": "Fire?", "choices": ["hots", "iced"], "label": 0},
]
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
metadata:
  version: 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.format(rows=rows))
    save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer(), tmp_path / "model")
    return tmp_path


def run(folder, task, *more):
    return main(
        [
            *("evaluate", str(folder / "model"), "--benchmark", f"lm-eval:{task}", "--data", str(folder / "tasks")),
            *("--device", "cpu", *more),
        ]
    )


def slow_accuracy():
    """Choose the answer of the highest log-probability, one at a time; a byte is a token."""
    model, tokenizer, right = make_model(FAMILY_CONFIGS["llama_gqa"]()), make_tokenizer(), 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                values = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            scores.append(values[len(row["question"]) - 1 :].sum().item())
        right += scores.index(max(scores)) == row["label"]
    return right / len(ROWS)


@installed
def test_a_local_task_is_scored_on_the_model(folder, capsys):
    assert run(folder, "tiny_choice", "--output", str(folder / "out"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tiny_choice acc"]["agg_value"] == pytest.approx(slow_accuracy())
    assert found["tiny_choice acc"]["rows"] == 3
    assert found["tiny_choice acc"]["note"] == "interval from lm-eval's standard error"
    assert json.loads((folder / "out" / "LM_EVAL_SUMMARY.json").read_text()) == found


@installed
def test_a_task_that_is_not_known_is_refused_with_the_nearest(folder, capsys):
    assert run(folder, "tiny_choise") == 2
    assert "did you mean tiny_choice?" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)  # importing it fails, as where it is absent
    assert run(folder, "wmdp") == 2
    assert "pip install 'loraprune[bench]'" in capsys.readouterr().err
