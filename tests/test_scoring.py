"""Scoring: what each metric measures, over a whole model, against plain restatements."""

from dataclasses import replace

import pytest
import torch
from conftest import FAMILY_CONFIGS, HEAD_CONFIGS, KINDS, make_batch, make_mask, masked, rows_of

from loraprune.records import OF_TRAINING
from loraprune.scoring import empty_scores, score_model
from loraprune.sensitivity import base_of
from loraprune.settings import Settings
from loraprune.step_scores import StepScores

GQA = FAMILY_CONFIGS["llama_gqa"]


def effective(layer):
    """W + s B A of a layer with an adapter."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (layer.get_base_layer().weight + layer.scaling["default"] * b @ a).detach().double()


def by_group(values, projection):
    lines = values.sum(1 - projection.axis)[projection.span]  # a part of the rows, where projections are fused
    return lines.reshape(projection.count, projection.size).sum(1)


def summed(model, groups, of_projection):
    base = model.get_base_model()
    return {
        kind: torch.stack(
            [
                sum(by_group(of_projection(base.get_submodule(p.module)), p) for p in one.projections)
                for one in groups.layers[kind]
            ]
        )
        for kind in KINDS
    }


def mean_losses(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    values = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return values.sum(1) / (labels != -100).sum(1)


@pytest.mark.parametrize("family, power", [("llama_gqa", 1), ("llama_gqa", 2), ("phi3", 1)])
def test_metric_grad_is_the_true_gradient_of_every_weight_times_the_weight(family, power):
    model, groups, live = masked(FAMILY_CONFIGS[family]())
    batch = make_batch()
    found = score_model(model, live, [batch], "retain", prune_metric="grad", loss="nll", power=power)
    weights = {name: one for name, one in model.named_parameters() if name.endswith("base_layer.weight")}
    for one in weights.values():
        one.requires_grad_(True)
    gradients = torch.autograd.grad(mean_losses(model, batch).sum(), list(weights.values()))
    known = {id(weight): gradient.double() for weight, gradient in zip(weights.values(), gradients, strict=True)}
    expected = summed(
        model, groups, lambda layer: (known[id(layer.get_base_layer().weight)] * effective(layer)).abs() ** power
    )
    for kind in KINDS:
        assert torch.allclose(found.values[kind], expected[kind] / 4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama_gqa", "phi3"])
def test_metric_magnitude_is_the_size_of_the_weights_with_their_adapters_and_needs_no_data(family):
    model, groups, live = masked(FAMILY_CONFIGS[family]())
    found = score_model(model, live, [], "retain", prune_metric="magnitude", loss="nll")
    expected = summed(model, groups, lambda layer: effective(layer).abs())
    for kind in KINDS:
        assert torch.allclose(found.values[kind], expected[kind], rtol=1e-5)


@pytest.mark.parametrize("metric", ["lora", "grad", "magnitude"])
def test_a_kv_groups_score_is_that_of_its_q_heads_and_of_its_key_and_value(metric):
    config, batch, found = HEAD_CONFIGS["llama_heads"](), make_batch(), {}
    for unit in ("q_head", "kv_group"):
        model, groups, live = masked(config, unit=unit)
        found[unit] = score_model(model, live, [batch], "retain", prune_metric=metric, loss="nll").values[unit]
    rest = found["kv_group"] - found["q_head"].reshape(2, 2, 4).sum(2)
    assert (rest > 0.02 * found["kv_group"]).all()
    base = model.get_base_model()
    if metric == "magnitude":
        shared = [
            sum(by_group(effective(base.get_submodule(one.module)).abs(), one) for one in layer.producers[1:])
            for layer in groups.layers["kv_group"]
        ]
        assert torch.allclose(rest, torch.stack(shared), rtol=1e-5)


def test_a_q_heads_gate_is_the_effect_of_removing_it():
    model, _, live = masked(HEAD_CONFIGS["llama_heads"](), unit="q_head")
    row = make_batch(rows=1)
    found = score_model(model, live, [row], "retain", prune_metric="gate", loss="nll").values["q_head"][1]
    effects = []
    for head in range(8):
        gate = torch.ones(1, 1, 32)
        gate[..., 4 * head : 4 * head + 4] = 1 - 1e-2
        with torch.no_grad(), live.gates(1, torch.device("cpu")) as gates:
            before = mean_losses(model, row)
            gates["q_head", 1].copy_(gate)
            effects.append(((mean_losses(model, row) - before) / 1e-2).abs().item())
    assert torch.allclose(found, torch.tensor(effects, dtype=torch.float64), rtol=0.05, atol=2e-3)


def test_metric_activation_is_the_mean_input_of_every_column_times_its_norm():
    model, groups, live = masked(GQA())
    batch = make_batch()
    found = score_model(
        model, live, [rows_of(batch, [0]), rows_of(batch, [1, 2, 3])], "retain", prune_metric="activation", loss="nll"
    )
    one = groups.layers["ffn_channel"][1].consumer
    module, seen = model.get_base_model().get_submodule(one.module), []
    with torch.no_grad():
        handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        handle.remove()
    lengths = batch["attention_mask"].sum(1)
    means = torch.stack([seen[0][row, : lengths[row]].abs().mean(0) for row in range(4)]).mean(0).double()
    assert torch.allclose(found.values["ffn_channel"][1], means * effective(module).norm(dim=0), rtol=1e-4)


def test_a_removed_group_has_no_activation():
    model, groups, live = masked(GQA())
    live.set(make_mask(groups, {"ffn_channel": [[3], []], "kv_group": [[], [1]]}))
    found = score_model(model, live, [make_batch()], "retain", prune_metric="activation", loss="nll").values
    assert found["ffn_channel"][0, 3] == 0.0
    assert found["kv_group"][1, 1] == 0.0
    assert (found["kv_group"][0] > 0).all()


def test_metric_random_says_the_same_at_every_step_another_thing_of_the_other_set_and_depends_on_the_seed():
    model, _, live = masked(GQA())

    def score(dataset_type, seed):
        found = score_model(model, live, [], dataset_type, prune_metric="random", loss="nll", seed=seed)
        return found.values["ffn_channel"]

    assert torch.equal(score("retain", 3), score("retain", 3))
    assert not torch.equal(score("retain", 3), score("forget", 3))
    assert not torch.equal(score("retain", 3), score("retain", 5))


@pytest.mark.parametrize("metric", ["grad", "activation", "magnitude", "random"])
def test_scoring_leaves_no_gradient_and_what_is_trained_as_it_was(metric):
    model, _, live = masked(GQA())
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    score_model(model, live, [make_batch()], "retain", prune_metric=metric, loss="nll")
    assert trained == {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("metric", ["grad", "activation", "gate", "lora"])
def test_one_batch_of_four_scores_as_four_batches_of_one(metric, unit_norm):
    model, _, live = masked(GQA())
    batch = make_batch()
    how = {"prune_metric": metric, "loss": "nll", "unit_norm": unit_norm}
    whole = score_model(model, live, [batch], "retain", **how)
    single = score_model(model, live, [rows_of(batch, [row]) for row in range(4)], "retain", **how)
    for kind in KINDS:
        assert torch.allclose(whole.values[kind], single.values[kind], rtol=1e-4)


# --- scores from training's own gradients ---


@pytest.mark.parametrize("metric", OF_TRAINING)
def test_a_training_step_scores_as_a_pass_over_its_rows_does(metric):
    model, _, live = masked(GQA())
    settings = Settings(metric=metric, score_from="training", seed=4)
    scores = StepScores(model, live, settings)
    model.eval()
    for half in ([0, 1], [2, 3]):
        batch = rows_of(make_batch(), half)
        with scores.watched(2, torch.device("cpu")):
            mean_losses(model, batch).sum().backward()
    scores.take_frozen()
    found = scores.read().values
    model.zero_grad()
    passes = score_model(model, live, [make_batch()], "retain", prune_metric=metric, loss="nll", seed=4)
    rows = 1 if metric in ("magnitude", "random") else 4
    for kind in KINDS:
        assert torch.allclose(found[kind], passes.values[kind] * rows, rtol=1e-4)


def test_metric_grad_leaves_nothing_on_frozen_weights_for_clipping_to_see():
    model, _, live = masked(GQA())
    scores = StepScores(model, live, Settings(metric="grad", score_from="training"))
    with scores.watched(4, torch.device("cpu")):
        mean_losses(model, make_batch()).sum().backward()
    scores.take_frozen()
    base = model.get_base_model()
    weights = [base_of(module).weight for module in base.modules() if hasattr(module, "lora_A")]
    assert weights and all(one.grad is None and not one.requires_grad for one in weights)
    assert any(float(one.sum()) > 0 for one in scores.read().values.values())


def test_steps_are_scored_as_often_as_asked_and_never_when_passes_are():
    model, _, live = masked(GQA())
    settings = Settings(metric="lora", score_from="training", score_every=3)
    scores = StepScores(model, live, settings)
    assert [step for step in range(1, 10) if scores.due(step)] == [3, 6, 9]
    scores.settings = replace(settings, score_from="passes")
    assert not any(scores.due(step) for step in range(1, 10))


def test_empty_scores_have_a_number_for_every_group():
    _, groups, live = masked(GQA())
    assert {kind: one.shape for kind, one in empty_scores(live).items()} == {
        kind: (2, groups.count(kind)) for kind in KINDS
    }
