"""What is made small: log p and log-odds of answer tokens, and the losses that push them down."""

import math

import pytest
import torch
from conftest import make_batch
from jaxtyping import TypeCheckError

from loraprune.objectives import (
    answer_log_odds,
    answer_log_probabilities,
    forget_loss,
    retain_loss,
    row_means,
    row_sums,
)


def one_answer(gap, others=5, dtype=torch.float32):
    """Logits whose right token stands `gap` above all others; one answer token, predicted at position 0."""
    logits = torch.zeros(1, 2, others + 1, dtype=dtype)
    logits[0, 0, 3] = gap
    return logits.requires_grad_(), torch.tensor([[-100, 3]])


def test_log_odds_are_log_p_minus_log_of_1_minus_p_where_that_is_finite():
    source = torch.Generator().manual_seed(0)
    batch, logits = make_batch(vocabulary=11), 2 * torch.randn(4, 9, 11, generator=source)
    odds, counted = answer_log_odds(logits, batch["labels"])
    log_p, _ = answer_log_probabilities(logits, batch["labels"])
    exact = log_p.double() - torch.log1p(-log_p.double().exp())
    assert torch.allclose(odds[counted].double(), exact[counted], atol=1e-4)


@pytest.mark.parametrize("gap", [40.0, 80.0, 1000.0])
def test_log_odds_and_their_gradient_stay_alive_at_a_gap_where_the_naive_formula_is_infinite(gap):
    logits, labels = one_answer(gap)
    log_p, _ = answer_log_probabilities(logits, labels)
    assert torch.isinf(log_p - torch.log(1 - log_p.exp())).all()
    odds, _ = answer_log_odds(logits, labels)
    assert odds.item() == pytest.approx(gap - math.log(5), rel=1e-6)
    (gradient,) = torch.autograd.grad(odds.sum(), logits)
    assert gradient[0, 0, 3] == 1.0
    assert torch.allclose(gradient[0, 0, [0, 1, 2, 4, 5]], torch.tensor(-0.2))


def test_the_gradient_of_the_log_likelihood_vanishes_on_what_is_known_by_heart():
    logits, labels = one_answer(40.0)
    (gradient,) = torch.autograd.grad(answer_log_probabilities(logits, labels)[0].sum(), logits)
    assert gradient.abs().max() < 1e-15


def test_log_probabilities_are_computed_in_float32_from_half_precision_logits():
    logits, labels = one_answer(3.0, dtype=torch.bfloat16)
    for measure in (answer_log_odds, answer_log_probabilities):
        values, _ = measure(logits, labels)
        assert values.dtype == torch.float32
        exact, _ = measure(one_answer(3.0)[0], labels)
        assert values.item() == pytest.approx(exact.item(), abs=1e-6)


def plain_row(logits, labels):
    """log p of each answer token of one row, one at a time."""
    values = []
    for position in range(1, len(labels)):
        if labels[position] != -100:
            values.append(torch.log_softmax(logits[position - 1].double(), -1)[labels[position]].item())
    return values


def test_rows_count_their_answer_tokens_only():
    batch = make_batch(vocabulary=11)
    logits = torch.randn(4, 9, 11, generator=torch.Generator().manual_seed(1))
    values, counted = answer_log_probabilities(logits, batch["labels"])
    plain = [plain_row(*one) for one in zip(logits, batch["labels"], strict=True)]
    assert counted.sum(1).tolist() == [len(one) for one in plain]
    assert row_sums(values, counted).tolist() == pytest.approx([sum(one) for one in plain], abs=1e-5)
    assert row_means(values, counted).tolist() == pytest.approx([sum(one) / len(one) for one in plain], abs=1e-5)
    every = [value for one in plain for value in one]
    assert retain_loss(logits, batch["labels"]).item() == pytest.approx(-sum(every) / len(every), abs=1e-5)


def test_prompt_and_padding_say_nothing_even_where_their_logits_are_not_numbers():
    batch = make_batch(vocabulary=11)
    logits = torch.randn(4, 9, 11, generator=torch.Generator().manual_seed(1))
    before = row_sums(*answer_log_probabilities(logits, batch["labels"]))
    asked = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))  # positions that predict an answer token
    broken = logits.masked_fill(~asked[..., None], torch.nan)
    assert torch.equal(row_sums(*answer_log_probabilities(broken, batch["labels"])), before)
    assert retain_loss(broken, batch["labels"]).isfinite()


ROWS, TOKENS, BASE = torch.tensor([-3.0, -8.0]), torch.tensor([2, 5]), torch.tensor([-2.5, -2.0])
BETA = 0.1


def plain_npo(row, tokens, base):
    return tokens * (2 / BETA) * math.log(1 + (math.exp(row / tokens) / math.exp(base / tokens)) ** BETA)


def plain_simnpo(row, tokens, base):
    return -(2 / BETA) * math.log(1 / (1 + math.exp(BETA / tokens * row)))


def plain_ascent(row, tokens, base):
    return row / tokens


PLAIN = {"npo": plain_npo, "simnpo": plain_simnpo, "ga": plain_ascent}


@pytest.mark.parametrize("kind", list(PLAIN))
def test_forget_losses_are_the_papers_formulas_npo_by_the_token(kind):
    each = [PLAIN[kind](*one) for one in zip(ROWS.tolist(), TOKENS.tolist(), BASE.tolist(), strict=True)]
    unit = sum(TOKENS.tolist()) / 2 if kind == "npo" else 1
    assert forget_loss(kind, ROWS, TOKENS, BASE, BETA).item() == pytest.approx(sum(each) / 2 / unit, rel=1e-5)


def test_npo_pushes_a_token_of_a_long_answer_as_hard_as_one_of_a_short_answer():
    tokens = torch.tensor([2, 200])
    rows = (-2.4 * tokens).requires_grad_()  # the sum of the tokens' log p, so that its gradient is that of each
    forget_loss("npo", rows, tokens, -0.1 * tokens, 1.0).backward()
    assert rows.grad[0].item() == pytest.approx(rows.grad[1].item(), rel=1e-5)


@pytest.mark.parametrize("kind", list(PLAIN))
def test_a_forget_loss_weighs_its_rows(kind):
    first, second = (forget_loss(kind, ROWS, TOKENS, BASE, BETA, torch.tensor(one)) for one in ([1.0, 0.0], [0.0, 1.0]))
    both = forget_loss(kind, ROWS, TOKENS, BASE, BETA, torch.tensor([2.0, -0.5]))
    assert both.item() == pytest.approx(2 * first.item() - 0.5 * second.item(), rel=1e-5)
    assert forget_loss(kind, ROWS, TOKENS, BASE, BETA).item() == pytest.approx(first.item() + second.item(), rel=1e-5)


@pytest.mark.parametrize("kind", list(PLAIN))
def test_going_down_a_forget_loss_makes_every_answer_less_likely(kind):
    rows = ROWS.clone().requires_grad_()
    forget_loss(kind, rows, TOKENS, BASE, BETA).backward()
    assert (rows.grad > 0).all()


@pytest.mark.parametrize("kind", ["npo", "simnpo"])
def test_npo_and_simnpo_flatten_out_and_gradient_ascent_does_not(kind):
    def pull(which, row):
        rows = torch.tensor([row], requires_grad=True)
        forget_loss(which, rows, torch.tensor([2]), torch.tensor([-1.0]), BETA).backward()
        return rows.grad.item()

    assert pull(kind, -400.0) < 1e-3 * pull(kind, -1.0)
    assert pull("ga", -400.0) == pull("ga", -1.0)


def test_npo_pushes_a_row_less_the_further_it_is_below_the_untouched_model():
    rows = torch.tensor([-2.0, -30.0], requires_grad=True)
    forget_loss("npo", rows, TOKENS, torch.tensor([-2.0, -2.0]), BETA).backward()
    assert rows.grad[1] < rows.grad[0]


def test_an_unknown_forget_loss_is_refused():
    with pytest.raises(ValueError, match="forget loss 'dpo' is not one of ga, npo, simnpo"):
        forget_loss("dpo", ROWS, TOKENS, BASE, BETA)


def test_shapes_in_signatures_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        answer_log_probabilities(torch.zeros(2, 3, 5), torch.zeros(3, 3, dtype=torch.long))
