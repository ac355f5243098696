"""What teacher-forced passes read is what a plain loop over rows and tokens finds, however rows are batched and padded."""

import math

import numpy as np
import pytest
import torch
from conftest import FAMILY_CONFIGS, adapted, make_model

from loraprune import answers
from loraprune.answers import candidate_losses, read_answers
from loraprune.data import NO_LABEL, Example, collate
from loraprune.evaluate import answer_values

PAD = 0
EXACT = {"abs": 1e-5, "rel": 0}


def make_examples(count=9, seed=0, least=1):
    """Rows of random tokens: prompts of 1 to 6 tokens, answers of `least` to 9, some tokens of each marked as facts."""
    source, rows = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, answer = source.integers(1, 7), source.integers(least, 10)
        ids = source.integers(3, 259, prompt + answer).tolist()
        facts = [False] * prompt + (source.random(answer) < 0.5).tolist()
        rows.append(Example(tuple(ids), tuple([NO_LABEL] * prompt + ids[prompt:]), tuple(facts)))
    return rows


def model_of(family="llama_gqa"):
    return make_model(FAMILY_CONFIGS[family]())


@torch.no_grad()
def slow_distributions(model, example):
    """The answer's tokens and, in front of each, log p of the whole vocabulary, (t, V): one row, one token at a time."""
    places = [place for place, label in enumerate(example.labels) if label != NO_LABEL]
    found = [model(input_ids=torch.tensor([example.input_ids[:place]])).logits[0, -1].double() for place in places]
    return [example.labels[place] for place in places], torch.stack(found).log_softmax(-1).numpy()


def slow_row(model, example):
    """Every teacher-forced metric of a row as its definition says it, in plain steps."""
    tokens, values = slow_distributions(model, example)
    chosen = [one[token] for one, token in zip(values, tokens, strict=True)]
    right = [int(one.argmax()) == token for one, token in zip(values, tokens, strict=True)]
    scores = []
    for one, token in zip(values, tokens, strict=True):
        mean = sum(math.exp(each) * each for each in one)
        variance = sum(math.exp(each) * (each - mean) ** 2 for each in one)
        scores.append((one[token] - mean) / math.sqrt(variance))
    loss = -sum(chosen) / len(chosen)
    return {
        "loss": loss,
        "probability": math.exp(-loss),
        "exact": all(right),
        "exact_memorization": slow_share(right[:-1]),
        "extraction_strength": slow_strength(right[:-1]),
        "min_k": slow_lowest(chosen[:-1]),
        "min_k_plus_plus": slow_lowest(scores[:-1]),
    }


def slow_share(right):
    return sum(right) / len(right)


def slow_strength(right):
    for begin in range(len(right)):
        if all(right[begin:]):
            return 1 - begin / len(right)
    return 1 / len(right)


def slow_lowest(values, share=0.4):
    lowest = sorted(values)[: max(1, int(len(values) * share))]
    return -sum(lowest) / len(lowest)


def knowing(model, examples):
    """The model, its output pulled towards these rows' tokens, so that some of them are the argmax."""
    with torch.no_grad():
        for one in examples:
            states = model.model(input_ids=torch.tensor([one.input_ids])).last_hidden_state[0]
            for place in range(len(one.input_ids) // 2, len(one.input_ids)):
                model.lm_head.weight[one.input_ids[place]] += 0.2 * states[place - 1]
    return model


@pytest.mark.parametrize("family", ["llama_gqa", "qwen2", "tied"])
def test_every_metric_is_what_its_definition_says_row_by_row(family):
    examples = make_examples(least=2)
    model = model_of(family) if family == "tied" else knowing(model_of(family), examples)
    for one, example in zip(read_answers(model, examples, batch_size=4, pad_token_id=PAD), examples, strict=True):
        for name, value in slow_row(model, example).items():
            assert getattr(one, name) == pytest.approx(value, **EXACT), name


def test_the_rows_that_definitions_are_tried_on_are_partly_known():
    examples = make_examples(least=2)
    found = read_answers(knowing(model_of(), examples), examples, batch_size=4, pad_token_id=PAD)
    shares = [one.exact_memorization for one in found]
    assert 0 < sum(shares) / len(shares) < 1
    assert any(one.extraction_strength > 0.5 for one in found)


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_the_batch_size_changes_nothing(batch_size):
    examples, model = make_examples(), model_of()
    together = read_answers(model, examples, batch_size=4, pad_token_id=PAD)
    for one, other in zip(
        together, read_answers(model, examples, batch_size=batch_size, pad_token_id=PAD), strict=True
    ):
        for name in ("log_probabilities", "means", "variances"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), **EXACT)
        assert (other.right == one.right).all()
        assert (other.facts == one.facts).all()


def padded_on_the_left(examples, pad):
    length = max(len(one.input_ids) for one in examples)
    batch = collate(examples, pad)
    shifts = [length - len(one.input_ids) for one in examples]
    return {
        name: torch.stack([row.roll(shift) for row, shift in zip(one, shifts, strict=True)])
        for name, one in batch.items()
    }


def test_the_padding_side_changes_nothing(monkeypatch):
    examples, model = make_examples(), model_of()
    right = read_answers(model, examples, batch_size=4, pad_token_id=PAD)
    monkeypatch.setattr(answers, "collate", padded_on_the_left)
    left = read_answers(model, examples, batch_size=4, pad_token_id=PAD)
    for one, other in zip(left, right, strict=True):
        for name in ("log_probabilities", "means", "variances"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), **EXACT)
        assert (one.facts == other.facts).all()


def test_what_pads_changes_nothing():
    examples, model = make_examples(), model_of()
    for one, other in zip(
        read_answers(model, examples, batch_size=9, pad_token_id=PAD),
        read_answers(model, examples, batch_size=9, pad_token_id=7),
        strict=True,
    ):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, **EXACT)


def test_a_vocabulary_that_is_worked_on_in_pieces_gives_the_same(monkeypatch):
    examples, model = make_examples(), model_of()
    whole = read_answers(model, examples, batch_size=9, pad_token_id=PAD)
    monkeypatch.setitem(answers.NUMBERS_AT_ONCE, "cpu", 1)
    for one, other in zip(whole, read_answers(model, examples, batch_size=9, pad_token_id=PAD), strict=True):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, **EXACT)
        assert one.variances == pytest.approx(other.variances, **EXACT)


def test_a_look_and_an_evaluation_read_the_same_tokens():
    examples = make_examples()
    model = adapted(model_of())
    looked = answer_values(model, examples, batch_size=4, pad_token_id=PAD)
    read = read_answers(model, examples, batch_size=4, pad_token_id=PAD, spread=False)
    for index, one in enumerate(read):
        assert looked.log_probability[index].item() == pytest.approx(one.log_probabilities.sum(), **EXACT)
        assert bool(looked.exact[index]) == one.exact
        assert looked.fact_log_probability[index].item() == pytest.approx(-one.fact_loss, **EXACT, nan_ok=True)
        assert one.means.size == one.variances.size == 0


def test_logits_are_computed_where_answers_are_and_nowhere_else():
    examples, model, shapes = make_examples(), model_of(), []
    hook = model.lm_head.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape)))
    read_answers(model, examples, batch_size=9, pad_token_id=PAD)
    hook.remove()
    assert shapes == [(1, sum(label != NO_LABEL for one in examples for label in one.labels), 259)]
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 259)


def test_reading_is_done_without_dropout_and_leaves_mode_and_gradients_alone():
    examples, model = make_examples(), adapted(model_of(), lora_dropout=0.5)
    quiet = read_answers(model, examples, batch_size=4, pad_token_id=PAD)
    model.train()
    for one, other in zip(quiet, read_answers(model, examples, batch_size=4, pad_token_id=PAD), strict=True):
        assert (one.log_probabilities == other.log_probabilities).all()
    assert model.training
    assert all(one.grad is None for one in model.parameters())


def test_an_answer_of_its_end_alone_has_a_loss_and_no_score_without_the_end():
    [one] = read_answers(model_of(), [Example((5, 2), (NO_LABEL, 2), (False, False))], batch_size=1, pad_token_id=PAD)
    assert one.loss > 0
    assert [math.isnan(getattr(one, name)) for name in ("exact_memorization", "min_k", "min_k_plus_plus")] == [True] * 3


def test_the_losses_of_several_answers_come_back_row_by_row():
    examples, model = make_examples(6), model_of()
    candidates = [examples[:1], examples[1:4], examples[4:]]
    found = candidate_losses(model, candidates, batch_size=2, pad_token_id=PAD)
    assert [len(one) for one in found] == [1, 3, 2]
    expected = [slow_row_loss(model, one) for one in examples]
    assert np.concatenate(found) == pytest.approx(expected, **EXACT)
    assert candidate_losses(model, [], batch_size=2, pad_token_id=PAD) == []


def slow_row_loss(model, example):
    tokens, values = slow_distributions(model, example)
    return -sum(one[token] for one, token in zip(values, tokens, strict=True)) / len(tokens)


# --- the other evaluation's attention mask ----------------------------------------------------------------------------


def with_ends_in_the_prompt(end=2):
    """Rows whose prompts hold the end-of-sequence token, as a conversation's do where it ends every turn."""
    rows = []
    for one in make_examples(least=2):
        prompt = (5, 6, end, 7, end)
        ids = (*prompt, *one.input_ids, end)
        labels = (*[NO_LABEL] * (len(prompt) + 1), *one.input_ids[1:], end)
        rows.append(Example(ids, labels, (False,) * len(ids)))
    return rows


@torch.no_grad()
def slow_hidden(model, example, hidden):
    """The loss of a row where every `hidden` token of it is masked out of attention."""
    ids = torch.tensor([example.input_ids])
    values = model(input_ids=ids, attention_mask=(ids != hidden).long()).logits[0, :-1].double().log_softmax(-1)
    labels = example.labels[1:]
    chosen = [values[place, label].item() for place, label in enumerate(labels) if label != NO_LABEL]
    return -sum(chosen) / len(chosen)


def test_compat_hides_the_ends_of_the_prompts_turns_and_the_default_does_not():
    examples, model = with_ends_in_the_prompt(), model_of()
    options = {"batch_size": 4, "pad_token_id": 2}
    right = [one.loss for one in read_answers(model, examples, **options)]
    quirk = [one.loss for one in read_answers(model, examples, compat="open-unlearning", **options)]
    assert right == pytest.approx([slow_row_loss(model, one) for one in examples], **EXACT)
    assert quirk == pytest.approx([slow_hidden(model, one, 2) for one in examples], **EXACT)
    size = max(abs(one - other) for one, other in zip(right, quirk, strict=True))
    assert 0.3 < size < 1  # nats: what the mask moves a row's loss by, here up to 0.5


def test_compat_changes_nothing_where_the_padding_token_stands_in_no_row():
    examples, model = with_ends_in_the_prompt(), model_of()
    right = read_answers(model, examples, batch_size=4, pad_token_id=PAD)
    for one, other in zip(
        right, read_answers(model, examples, batch_size=4, pad_token_id=PAD, compat="open-unlearning"), strict=True
    ):
        assert one.loss == other.loss
