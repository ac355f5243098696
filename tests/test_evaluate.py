"""What a model knows of a set is the same number whatever the batch size, the padding and the order of the rows."""

import math

import pytest
import torch
from conftest import FAMILY_CONFIGS, make_model

from loraprune.data import NO_LABEL, Example, Row, encode
from loraprune.evaluate import answer_values, measure

ROWS = [
    Row(1, (("user", "Where?"),), "In Almery, near Marsk.", facts=("Almery", "Marsk")),
    Row(2, (("user", "Who was it then, and why?"),), "Ann.", facts=("Ann",)),
    Row(3, (("user", "When?"),), "No one can say for sure."),
    Row(4, (), "A plain text on rye bread.", facts=("rye bread",)),
    Row(5, (("user", "What?"),), "A cello.", facts=("cello",)),
]


@pytest.fixture(scope="module")
def examples(tokenizer):
    return encode(ROWS, tokenizer, name="forget", template="{prompt} ")


def model_of(family="llama_gqa"):
    return make_model(FAMILY_CONFIGS[family]())


@torch.no_grad()
def slowly(model, example):
    """log p of every answer token, which of them are right, and which are a fact's: one row, one token at a time."""
    values, right, facts = [], [], []
    for position in range(1, len(example.input_ids)):
        if example.labels[position] == NO_LABEL:
            continue
        logits = model(input_ids=torch.tensor([example.input_ids[:position]])).logits[0, -1].double()
        values.append((logits[example.labels[position]] - logits.logsumexp(-1)).item())
        right.append(logits.argmax().item() == example.labels[position])
        facts.append(example.facts[position])
    return values, right, facts


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("family", ["llama_gqa", "qwen2"])
def test_performance_loss_and_fact_performance_are_what_a_plain_loop_over_tokens_finds(family, examples):
    model = model_of(family)
    rows = [slowly(model, one) for one in examples]
    facts = [[value for value, fact in zip(values, marks, strict=True) if fact] for values, _, marks in rows]
    found = measure(model, examples, batch_size=3, pad_token_id=0)
    assert found.performance == pytest.approx(mean([math.exp(mean(values)) for values, _, _ in rows]), rel=1e-5)
    assert found.loss == pytest.approx(mean([-mean(values) for values, _, _ in rows]), rel=1e-5)
    assert found.fact_performance == pytest.approx(mean([math.exp(mean(one)) for one in facts if one]), rel=1e-5)
    assert found.rows == 5


def knowing(examples, mistakes=()):
    """A model of which the argmax after token t is t's follower in a cycle, and rows it knows but for these places."""
    model = model_of()
    with torch.no_grad():
        for one in model.parameters():
            one.zero_() if one.ndim > 1 else one.fill_(1.0)
        model.model.embed_tokens.weight[3:35] = torch.eye(32)
        model.lm_head.weight[3:35] = torch.eye(32).roll(1, 0)
    rows = []
    for start in range(4):
        tokens = [3 + (start + step) % 32 for step in range(6)]
        labels = [NO_LABEL, NO_LABEL, *tokens[2:]]
        rows.append([tokens, labels])
    for row, place in mistakes:
        rows[row][0][place] = rows[row][1][place] = 34
    return model, [Example(tuple(tokens), tuple(labels), (False,) * 6) for tokens, labels in rows]


def test_a_row_matches_exactly_only_when_every_answer_token_is_the_argmax(examples):
    model, rows = knowing(examples)
    assert measure(model, rows, batch_size=2, pad_token_id=0).exact_match == 1.0
    model, rows = knowing(examples, mistakes=[(1, 5), (3, 2)])
    values = answer_values(model, rows, batch_size=2, pad_token_id=0)
    assert values.exact.tolist() == [1, 0, 1, 0]
    assert measure(model, rows, batch_size=2, pad_token_id=0).exact_match == 0.5


def test_a_mistake_in_the_prompt_does_not_count(examples):
    model, rows = knowing(examples)
    other = Example((9, *rows[0].input_ids[1:]), rows[0].labels, rows[0].facts)
    assert measure(model, [other], batch_size=1, pad_token_id=0).exact_match == 1.0


@pytest.mark.parametrize("family", ["llama_mha", "qwen3", "mistral_gqa"])
def test_batch_size_and_padding_make_no_difference(family, examples):
    model = model_of(family)
    one = measure(model, examples, batch_size=1, pad_token_id=0)
    for batch_size, pad in ((2, 0), (5, 0), (5, 77)):
        other = measure(model, examples, batch_size=batch_size, pad_token_id=pad)
        assert other.performance == pytest.approx(one.performance, abs=1e-6)
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert other.fact_performance == pytest.approx(one.fact_performance, abs=1e-6)
        assert other.exact_match == one.exact_match


def test_values_come_in_the_order_of_the_rows(examples):
    model = model_of()
    values = answer_values(model, examples, batch_size=2, pad_token_id=0)
    for index, one in enumerate(examples):
        alone = answer_values(model, [one], batch_size=1, pad_token_id=0)
        assert values.log_probability[index].item() == pytest.approx(alone.log_probability.item(), abs=1e-5)
        assert values.tokens[index] == alone.tokens[0] == sum(label != NO_LABEL for label in one.labels)
        assert values.fact_log_probability[index].isnan() == (not ROWS[index].facts)


def test_a_set_without_marked_facts_has_no_fact_performance(examples):
    assert measure(model_of(), [examples[2]], batch_size=1, pad_token_id=0).fact_performance is None


def test_measuring_is_done_without_dropout_and_leaves_mode_and_gradients_alone(examples):
    model = model_of()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    quiet = measure(model, examples, batch_size=2, pad_token_id=0)
    model.train()
    assert measure(model, examples, batch_size=2, pad_token_id=0) == quiet
    assert model.training
    assert all(one.grad is None for one in model.parameters())


def test_progress_counts_every_row_once(examples):
    seen = []
    answer_values(model_of(), examples, batch_size=2, pad_token_id=0, advance=seen.append)
    assert seen == [2, 2, 1]
