"""Relearning ahead: the forget loss is taken where a step of relearning would bring the adapters, and nowhere stays."""

from itertools import cycle

import pytest
import torch
from test_trainer import BETA, make_trainer, plain_losses, target, untouched_rows
from torch import nn

from loraprune import steering
from loraprune.objectives import answer_log_probabilities, forget_loss, logits_of, row_sums
from loraprune.relearning import gradients_of, moved


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model


def trained(model):
    return [one for one in model.parameters() if one.requires_grad]


def test_every_trained_weight_moves_by_the_radius_the_way_its_gradient_points_and_comes_back():
    model = small_model()
    before = [one.detach().clone() for one in model.parameters()]
    gradients = [torch.randn_like(one) for one in trained(model)]
    gradients[-1] = None
    with pytest.raises(KeyboardInterrupt), moved(model, gradients, 0.25, lambda: True):
        for one, old, gradient in zip(trained(model), [before[0], *before[2:]], gradients, strict=True):
            expected = old if gradient is None else old + 0.25 * gradient.sign()
            assert torch.equal(one, expected)
        assert torch.equal(model[0].bias, before[1])
        raise KeyboardInterrupt
    assert all(torch.equal(one, old) for one, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("teaching", "length"), [(1, 0.4), (2, 0.2), (4, 0.05), (None, 0.0)])
def test_a_step_that_does_not_teach_is_halved_and_where_none_does_nothing_moves(teaching, length):
    model, asked = small_model(), []
    before = [one.detach().clone() for one in trained(model)]
    gradients = [torch.randn_like(one) for one in before]

    def teaches():
        asked.append([one.detach().clone() for one in trained(model)])
        return len(asked) == teaching

    def at(length):
        return [one + length * gradient.sign() for one, gradient in zip(before, gradients, strict=True)]

    with moved(model, gradients, 0.4, teaches):
        torch.testing.assert_close([one.detach() for one in trained(model)], at(length))
    assert len(asked) == (teaching or 4)
    for one, tried in zip(asked, (0.4, 0.2, 0.1, 0.05), strict=False):
        torch.testing.assert_close(one, at(tried))
    assert all(torch.equal(one, old) for one, old in zip(trained(model), before, strict=True))


def test_gradients_add_up_over_the_losses_and_what_lay_on_the_weights_stays():
    model, inputs = small_model(), torch.randn(5, 3)
    model(inputs).square().sum().backward()
    lying = [one.grad.clone() for one in trained(model)]
    found = gradients_of(model, [lambda: model(inputs[:2]).sum(), lambda: model(inputs[2:]).sum()])
    whole = torch.autograd.grad(model(inputs).sum(), trained(model))
    for one, gradient, expected, old in zip(trained(model), found, whole, lying, strict=True):
        torch.testing.assert_close(gradient, expected)
        assert torch.equal(one.grad, old)


def log_probability(trainer, batch):
    values, counted = answer_log_probabilities(logits_of(trainer.adapted, batch), batch["labels"])
    return row_sums(values, counted), counted.sum(1)


def gradient_of(trainer, batch):
    trainer.current_gradient_accumulation_steps = 1  # else set where training begins
    trainer.adapted.zero_grad()
    trainer.training_step(trainer.adapted, batch)
    return [one.grad.clone() for one in trained(trainer.adapted)]


def halves_of(batch):
    middle = (len(batch["rows"]) + 1) // 2
    return [{name: one[part] for name, one in batch.items()} for part in (slice(middle), slice(middle, None))]


@pytest.mark.parametrize(("kind", "halved"), [("npo", 0), ("simnpo", 0), ("ga", 0), ("npo", 2)])
def test_a_step_pushes_each_half_where_relearning_the_other_leads_as_hard_as_what_is_known_here_asks(
    tmp_path, tokenizer, monkeypatch, kind, halved
):
    how = {"forget_loss": kind, "relearning_radius": 3.0, "forget_batch_size": 3}  # halves of two rows and of one
    trainer = make_trainer(tmp_path, tokenizer, target(0.0), **how)
    if halved:
        answers = cycle([*[False] * halved, True])
        monkeypatch.setattr(trainer.balance, "_is_likelier", lambda *_: next(answers))
    batch = next(iter(trainer.get_train_dataloader()))
    before = [one.detach().clone() for one in trained(trainer.adapted)]
    found = gradient_of(trainer, batch)
    assert all(torch.equal(one, old) for one, old in zip(trained(trainer.adapted), before, strict=True))

    expected = kept_gradient(trainer, batch)
    rows, tokens = log_probability(trainer, batch["forget"])
    way = trainer.steering.target.way_left((rows / tokens).exp().mean().item(), 0.002)
    assert 0 < way <= 1
    halves = halves_of(batch["forget"])
    for half, other in (halves, reversed(halves)):
        towards = towards_relearning(trainer, other)
        here, lengths = log_probability(trainer, other)
        with torch.no_grad():  # 3 learning rates of 0.01
            for one, gradient in zip(trained(trainer.adapted), towards, strict=True):
                one.add_(0.03 / 2**halved * gradient.sign())
        there, _ = log_probability(trainer, other)
        assert (there / lengths).sum() > (here / lengths).sum()  # the other half is likelier there
        there, own = log_probability(trainer, half)
        push = forget_loss(kind, there, own, untouched_rows(half), BETA)
        counts = own.sum() / tokens.sum() if kind == "npo" else len(own) / len(tokens)  # npo is a mean over tokens
        pushed = torch.autograd.grad(
            trainer.settings.forget_retain_ratio * way * counts * push, trained(trainer.adapted)
        )
        expected = [a + b for a, b in zip(expected, pushed, strict=True)]
        with torch.no_grad():
            for one, old in zip(trained(trainer.adapted), before, strict=True):
                one.copy_(old)
    for one, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(one, gradient, rtol=1e-4, atol=1e-6)


def kept_gradient(trainer, batch):
    rows, tokens = log_probability(trainer, batch["retain"])
    return list(torch.autograd.grad(-rows.sum() / tokens.sum(), trained(trainer.adapted)))


def towards_relearning(trainer, batch):
    rows, tokens = log_probability(trainer, batch)
    return torch.autograd.grad((rows / tokens).sum(), trained(trainer.adapted))


def test_a_step_teaches_where_rows_have_become_likelier(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0), relearning_radius=3.0)
    parts = halves_of(next(iter(trainer.get_train_dataloader()))["forget"])
    rows, tokens = zip(*(log_probability(trainer, one) for one in parts), strict=True)
    now = (torch.cat(rows) / torch.cat(tokens)).detach()
    assert trainer.balance._is_likelier(trainer.adapted, parts, now - 0.01)
    assert not trainer.balance._is_likelier(trainer.adapted, parts, now + 0.01)


def test_a_row_alone_in_its_batch_is_pushed_where_relearning_itself_leads(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0), relearning_radius=3.0)
    batch = next(iter(trainer.get_train_dataloader()))
    single = {name: one[:1] for name, one in batch["forget"].items()}
    found = gradient_of(trainer, {"retain": batch["retain"], "forget": single})
    kept = kept_gradient(trainer, batch)
    rows, tokens = log_probability(trainer, single)
    way = trainer.steering.target.way_left((rows / tokens).exp().mean().item(), 0.002)
    with moved(trainer.adapted, towards_relearning(trainer, single), 0.03, lambda: True):
        there, _ = log_probability(trainer, single)
        push = (
            trainer.settings.forget_retain_ratio * way * forget_loss("npo", there, tokens, untouched_rows(single), BETA)
        )
        pushed = torch.autograd.grad(push, trained(trainer.adapted))
    assert any(gradient.abs().sum() > 0 for gradient in pushed)
    for one, a, b in zip(found, kept, pushed, strict=True):
        torch.testing.assert_close(one, a + b, rtol=1e-4, atol=1e-6)


def test_without_a_forget_set_a_step_is_trainers_own(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, None, forget=False, relearning_radius=3.0)
    monkeypatch.setattr(trainer, "_step_in_parts", lambda *_: pytest.fail("a step in parts"))
    assert any(one.abs().sum() > 0 for one in gradient_of(trainer, next(iter(trainer.get_train_dataloader()))))


def test_without_a_radius_a_step_is_taken_at_the_adapters_as_they_are(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0), relearning_radius=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    found = gradient_of(trainer, batch)
    expected = torch.autograd.grad(trainer.compute_loss(trainer.adapted, batch), trained(trainer.adapted))
    for one, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(one, gradient)


def test_what_is_below_the_target_is_pulled_up(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, target(0.0), relearning_radius=3.0)
    batch = next(iter(trainer.get_train_dataloader()))
    rows, tokens = log_probability(trainer, batch["forget"])
    known = (rows / tokens).exp().mean().item()
    retain, _, _ = plain_losses(trainer, batch)
    for goal in (known / 2, known, known * 2):
        trainer.balance.steering.__dict__["target"] = target(goal)
        trainer.balance.steering.__dict__["forget_before"] = 4 * known
        loss = trainer.compute_loss(trainer.adapted, batch).item() - retain.item()
        push = forget_loss("npo", rows, tokens, untouched_rows(batch["forget"]), BETA).item()
        way = (known - goal) / (4 * known - goal)
        assert loss == pytest.approx(trainer.settings.forget_retain_ratio * way * push, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("radius", [0.0, 3.0])
@pytest.mark.parametrize("kind", ["npo", "simnpo", "ga"])
def test_rows_that_are_steered_apart_weigh_the_same_in_parts_of_any_size(
    tmp_path, tokenizer, monkeypatch, kind, radius
):
    monkeypatch.setattr(steering, "ONE_PLACE", 1e-6)  # the rows of an untaught model are all nearly alike
    trainer = make_trainer(tmp_path, tokenizer, target(0.0), forget_loss=kind, relearning_radius=radius)
    batch = next(iter(trainer.get_train_dataloader()))
    rows, tokens = log_probability(trainer, batch["forget"])
    known = (rows / tokens).exp().detach()
    middle = known.sort().values[1:3].mean().item()
    trainer.steering.__dict__.update(target=target(middle), forget_before=2 * known.max().item())
    trainer.steering.__dict__["spread"] = (0.0, middle, 2 * known.max().item())
    ways = trainer.steering.ways_left(known)
    assert (ways > 0).any() and (ways < 0).any()
    whole = gradient_of(trainer, batch)
    trainer.settings.__dict__["micro_batch_size"] = 1
    for one, parts in zip(whole, gradient_of(trainer, batch), strict=True):
        torch.testing.assert_close(one, parts, rtol=1e-4, atol=1e-6)
    if not radius:
        push = forget_loss(kind, rows, tokens, untouched_rows(batch["forget"]), BETA, ways)
        retain, _, _ = plain_losses(trainer, batch)
        expected = retain.item() + trainer.settings.forget_retain_ratio * push.item()
        assert trainer.compute_loss(trainer.adapted, batch).item() == pytest.approx(expected, rel=1e-5)
