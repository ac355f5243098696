"""What an attack says of membership is what its definition says, row by row, and changes nothing in the model."""

import math

import pytest
import torch
from conftest import FAMILY_CONFIGS, adapted, make_model
from test_answers import make_examples

from loraprune.data import NO_LABEL, Example
from loraprune.membership import Side, attack, gradient_norms, leakage

EXACT = {"abs": 1e-5, "rel": 0}


def model_of(family="llama_gqa"):
    return make_model(FAMILY_CONFIGS[family]())


def slow_norm(model, example):
    """Backward in the textbook way: gradients in the parameters, one row alone, the last answer token left out."""
    model.zero_grad()
    values = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    places = [place for place, label in enumerate(example.labels) if label != NO_LABEL][:-1]
    (-sum(values[place - 1, example.labels[place]] for place in places) / len(places)).backward()
    norms = [one.grad.norm(2).item() for one in model.parameters() if one.grad is not None]
    model.zero_grad()
    return sum(norms) / len(norms)


@pytest.mark.parametrize("family", ["llama_gqa", "qwen2", "tied"])
def test_a_gradient_norm_is_that_of_a_plain_backward_pass(family):
    model, examples = model_of(family), make_examples(least=2)
    found = gradient_norms(model, examples, pad_token_id=0)
    assert found == pytest.approx([slow_norm(model, one) for one in examples], **EXACT)


def test_of_an_adapted_model_the_adapters_gradients_count_alone():
    model, examples = adapted(model_of()), make_examples(4, least=2)
    found = gradient_norms(model, examples, pad_token_id=0)
    assert found == pytest.approx([slow_norm(model, one) for one in examples], **EXACT)


def test_gradients_leave_the_model_as_it_was():
    model, examples = model_of(), make_examples(3, least=2)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    model.train()
    gradient_norms(model, examples, pad_token_id=0)
    assert model.training
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_an_answer_of_its_end_alone_has_no_gradient_norm():
    [one] = gradient_norms(model_of(), [Example((5, 2), (NO_LABEL, 2), (False, False))], pad_token_id=0)
    assert math.isnan(one)


def test_compat_hides_the_padding_token_in_this_pass_too():
    model = model_of()
    [example] = make_examples(1, least=4)
    hidden = example.input_ids[0]
    [right] = gradient_norms(model, [example], pad_token_id=hidden)
    [quirk] = gradient_norms(model, [example], pad_token_id=hidden, compat="open-unlearning")
    assert right == pytest.approx(slow_norm(model, example), **EXACT)
    assert abs(quirk - right) > 1e-3


def test_an_attack_counts_pairs_told_right_and_leaves_out_rows_without_a_score():
    members, others = Side([0.1, 0.5, math.nan], [0, 1, 2]), Side([0.4, 0.5, 0.9, 1.0], [0, 1, 2, 2])
    found = attack(members, others)
    assert found.value == pytest.approx((4 + 0 + 0.5 + 1 + 1) / 8)
    assert (found.members, found.others) == (2, 4)
    low, high = found.interval
    assert 0 <= low <= found.value <= high <= 1
    assert attack(Side([math.nan], [0]), others) is None


def test_an_attack_on_one_fact_a_side_has_no_interval():
    assert attack(Side([0.1, 0.2], [0, 0]), Side([0.4, 0.5], [0, 1])).interval is None


def test_leakage_is_relative_to_the_reference_or_else_to_guessing():
    sides = Side([0.1, 0.5, 0.2, 0.3], [0, 1, 2, 3]), Side([0.4, 0.5, 0.9, 0.25], [0, 1, 2, 3])
    same = leakage(sides, sides)
    assert same.value == pytest.approx(0)
    assert same.interval == pytest.approx((0, 0))  # the same draw for both models
    auc = attack(*sides).value
    assert leakage(sides, None).value == pytest.approx(((1 - auc) - 0.5) / (0.5 + 1e-10) * 100)
    without = Side([math.nan, 0.5, 0.2, 0.3], [0, 1, 2, 3]), sides[1]
    assert leakage(sides, without).members == 3
