"""Sensitivity is the formula it says, whatever the batch size, and both sets compare after normalisation."""

import inspect

import pytest
import torch
from conftest import FAMILY_CONFIGS, KINDS, adapted, make_batch, make_mask, make_model, masked, rows_of
from peft import LoraConfig, get_peft_model
from torch import nn

from loraprune import sensitivity
from loraprune.groups import find_groups
from loraprune.mask import LiveMask, full_mask
from loraprune.memory import traced
from loraprune.objectives import answer_log_odds, answer_log_probabilities, row_means
from loraprune.records import ProjectionGroups, Sensitivity
from loraprune.scoring import score_model
from loraprune.sensitivity import (
    AdapterGradient,
    MovingAverage,
    SensitivityDict,
    adapter_gradient,
    adapter_importance,
    compute_dual_sensitivity,
    compute_sensitivity,
    dual_score,
    gate_importance,
    nonfinite_layers,
    normalised,
    share_of,
    update_sensitivity_dict,
)

GQA = FAMILY_CONFIGS["llama_gqa"]


def losses(model, batch, loss="nll"):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    measure = answer_log_odds if loss == "log_odds" else answer_log_probabilities
    return -row_means(*measure(logits, batch["labels"]))


def after_backward(config=GQA, **settings):
    """A model whose adapters carry the gradient of a batch, its groups, and a projection of each kind and axis."""
    model, groups, _ = masked(config(), **settings)
    losses(model, make_batch()).sum().backward()
    return model.get_base_model(), groups


def projections_of(groups):
    """One projection for each kind and axis."""
    return [one for kind in KINDS for one in (groups.layers[kind][1].producers[0], groups.layers[kind][1].consumer)]


# --- metric lora ---


def restated(layer, gradient, groups, power, third_term):
    """The formula of arXiv 2305.18403, eq. 8 with whole matrices, in float64."""
    a, b = (one["default"].weight.detach().double() for one in (layer.lora_A, layer.lora_B))
    weight = layer.get_base_layer().weight.double() + layer.scaling["default"] * (b @ a)
    estimate = gradient.b.double() @ a + b @ gradient.a.double()
    if third_term:
        estimate = estimate - gradient.b.double() @ gradient.a.double()
    importance = (estimate * weight).abs() ** power
    if groups.axis == 0:
        importance = importance[groups.start : groups.start + groups.count * groups.size]
    lines = importance.sum(1 - groups.axis)
    return lines.reshape(groups.count, groups.size).sum(1)


@pytest.mark.parametrize(
    "chunk", [1, 5 * 32, 7 * 24, 2**18]
)  # weights: pieces of a row, of rows that leave a rest, whole
@pytest.mark.parametrize("third_term", [False, True])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_metric_lora_is_the_papers_formula_on_rows_and_on_columns_in_chunks_of_any_size(
    rank, power, third_term, chunk, monkeypatch
):
    monkeypatch.setattr(sensitivity, "CPU_CHUNK", chunk)
    base, groups = after_backward(lora_rank=rank)
    for one in projections_of(groups):
        layer = base.get_submodule(one.module)
        gradient = adapter_gradient(layer)
        found = adapter_importance(layer, gradient, one, power=power, third_term=third_term)
        assert torch.allclose(found, restated(layer, gradient, one, power, third_term), rtol=1e-5, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_metric_lora_makes_no_second_matrix_of_the_weights_size(axis):
    module = nn.Sequential(nn.Linear(3072, 1024, bias=False, dtype=torch.bfloat16))
    layer = get_peft_model(module, LoraConfig(r=4, target_modules=["0"])).base_model.model[0]
    gradient = AdapterGradient(torch.randn(4, 3072), torch.randn(1024, 4))
    groups = ProjectionGroups("0", "ffn_channel", axis, (1024, 3072)[axis], 1)
    taken = max(traced(lambda: adapter_importance(layer, gradient, groups)))
    assert taken < 2 * sensitivity.CPU_CHUNK * 4 + 2**19  # two float32 buffers, and what is as long as a side


def test_the_third_term_depends_on_the_losss_scale_and_the_others_do_not():
    base, groups = after_backward()
    one = groups.layers["ffn_channel"][0].consumer
    layer = base.get_submodule(one.module)
    gradient = adapter_gradient(layer)
    tenfold = AdapterGradient(10 * gradient.a, 10 * gradient.b)
    plain, tall = (adapter_importance(layer, g, one) for g in (gradient, tenfold))
    assert torch.allclose(tall, 10 * plain, rtol=1e-5)
    plain, tall = (adapter_importance(layer, g, one, third_term=True) for g in (gradient, tenfold))
    assert not torch.allclose(tall, 10 * plain, rtol=1e-2)


def test_unit_norm_divides_by_the_norm_over_the_projections_groups():
    base, groups = after_backward()
    one = groups.layers["ffn_channel"][0].consumer
    layer = base.get_submodule(one.module)
    plain = compute_sensitivity(layer, False, "retain", "lora", groups=one)
    unit = compute_sensitivity(layer, False, "retain", "lora", groups=one, unit_norm=True)
    assert torch.allclose(unit, plain / (plain.norm() + 1e-6))


@pytest.mark.parametrize("chunk", [200, 2**18])  # weights at a time
def test_metric_lora_of_a_part_of_a_fused_projection_sees_the_rows_of_that_part_alone(chunk, monkeypatch):
    monkeypatch.setattr(sensitivity, "CPU_CHUNK", chunk)
    base, groups = after_backward(FAMILY_CONFIGS["phi3"])
    for kind, parts in (("kv_group", 3), ("ffn_channel", 2)):
        producers = groups.layers[kind][0].producers
        layer = base.get_submodule(producers[0].module)
        gradient = adapter_gradient(layer)
        found = [adapter_importance(layer, gradient, one) for one in producers]
        assert len(found) == parts
        for values, one in zip(found, producers, strict=True):
            assert torch.allclose(values, restated(layer, gradient, one, 1, False), rtol=1e-5)
        for one in producers:  # a gradient on the rows of one part is seen in that part's groups, and nowhere else
            b = torch.zeros_like(gradient.b)
            b[one.span.start + one.size] = 1.0  # the first row of its second group
            alone = AdapterGradient(torch.zeros_like(gradient.a), b)
            seen = [adapter_importance(layer, alone, other).nonzero().flatten().tolist() for other in producers]
            assert seen == [[1] if other is one else [] for other in producers]


def test_metric_lora_of_a_model_sums_over_all_projections_that_a_group_cuts(config):
    model, groups, live = masked(config)
    batch = make_batch()
    scored = score_model(model, live, [batch], "retain", prune_metric="lora", loss="nll")
    losses(model, batch).sum().backward()
    for kind in KINDS:
        for one in groups.layers[kind]:
            layers = [(model.get_base_model().get_submodule(p.module), p) for p in one.projections]
            expected = sum(restated(layer, adapter_gradient(layer), p, 1, False) for layer, p in layers)
            assert torch.allclose(scored.values[kind][one.layer], expected / 4, rtol=1e-4)


# --- metric gate ---


def test_gate_importance_takes_the_absolute_value_per_example_after_summing_a_groups_columns():
    _, groups = after_backward()
    one = groups.layers["kv_group"][0].consumer  # 4 groups of 8 columns
    gradient = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0))
    for power in (1, 2):
        expected = [
            sum(abs(sum(gradient[e, 0, g * 8 + c].double().item() for c in range(8))) ** power for e in range(3))
            for g in range(4)
        ]
        assert gate_importance(gradient, one, power).tolist() == pytest.approx(expected, rel=1e-9)


def test_two_examples_that_pull_a_group_in_opposite_directions_do_not_cancel():
    one = find_groups(make_model(GQA()), GQA()).layers["ffn_channel"][0].consumer
    gradient = torch.zeros(2, 1, 24)
    gradient[0, 0, 3], gradient[1, 0, 3] = 5.0, -5.0
    assert gate_importance(gradient, one, 1)[3] == 10.0


@pytest.mark.parametrize("loss", ["nll", "log_odds"])
def test_the_gate_score_of_a_model_is_the_mean_over_examples_of_what_removing_each_group_would_do(loss):
    model, groups, live = masked(FAMILY_CONFIGS["qwen3"]())
    batch = make_batch(rows=3)
    scored = score_model(model, live, [batch], "forget", prune_metric="gate", loss=loss)
    step = 1e-2
    for kind, layer, index in (("kv_group", 0, 1), ("kv_group", 1, 3), ("ffn_channel", 0, 4), ("ffn_channel", 1, 17)):
        size = groups.layers[kind][layer].consumer.size
        columns = slice(index * size, (index + 1) * size)
        sides = []
        for factor in (1 + step, 1 - step):
            with torch.no_grad(), live.gates(3, torch.device("cpu")) as gates:
                gates[kind, layer][:, :, columns] = factor
                sides.append(losses(model, batch, loss).double())
        effect = ((sides[0] - sides[1]) / (2 * step)).abs().mean().item()
        assert scored.values[kind][layer, index].item() == pytest.approx(effect, rel=2e-2, abs=1e-3)


# --- invariant 4 ---


@pytest.mark.parametrize("metric", ["gate", "lora"])
def test_one_batch_of_eight_scores_as_eight_batches_of_one(family, metric):
    model, _, live = masked(FAMILY_CONFIGS[family]())
    batch = make_batch(rows=8, length=17)
    whole = score_model(model, live, [batch], "retain", prune_metric=metric, loss="log_odds")
    ones = [rows_of(batch, [row]) for row in range(8)]
    single = score_model(model, live, ones, "retain", prune_metric=metric, loss="log_odds")
    for kind in KINDS:
        assert torch.allclose(whole.values[kind], single.values[kind], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["gate", "lora"])
def test_gradient_checkpointing_changes_no_score(metric):
    model, _, live = masked(FAMILY_CONFIGS["qwen2"]())
    plain = score_model(model, live, [make_batch()], "retain", prune_metric=metric, loss="nll")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again = score_model(model, live, [make_batch()], "retain", prune_metric=metric, loss="nll")
    for kind in KINDS:
        assert torch.equal(plain.values[kind], again.values[kind])


def test_gates_have_the_same_gradient_when_activations_are_computed_twice():
    model, _, live = masked(GQA())
    batch, found = make_batch(), []
    for checkpointing in (False, True):
        model.train(checkpointing)  # checkpointing is at work in training mode only; there is no dropout here
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with live.gates(4, torch.device("cpu")) as gates:
            losses(model, batch).sum().backward()
        found.append({key: one.grad for key, one in gates.items()})
    for key in found[0]:
        assert torch.allclose(found[0][key], found[1][key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", ["gate", "lora"])
def test_dropout_and_the_training_mode_change_no_score_and_the_mode_comes_back(metric):
    config = GQA()
    base = make_model(config)
    groups = find_groups(base, config)
    model = adapted(base, lora_dropout=0.5)
    live = LiveMask(model, groups)
    quiet = score_model(model, live, [make_batch()], "retain", prune_metric=metric, loss="nll")
    assert not model.training
    model.train()
    again = score_model(model, live, [make_batch()], "retain", prune_metric=metric, loss="nll")
    assert model.training
    for kind in KINDS:
        assert torch.equal(quiet.values[kind], again.values[kind])


@pytest.mark.parametrize("metric", ["gate", "lora"])
def test_scoring_leaves_no_gradient_and_freezes_no_adapter(metric):
    model, _, live = masked(GQA())
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    losses(model, make_batch()).sum().backward()  # a gradient that would be added to
    fresh = score_model(model, live, [make_batch()], "retain", prune_metric=metric, loss="nll")
    assert all(one.grad is None for one in model.parameters())
    assert {name for name, one in model.named_parameters() if one.requires_grad} == trained
    again = score_model(model, live, [make_batch()], "retain", prune_metric=metric, loss="nll")
    for kind in KINDS:
        assert torch.equal(fresh.values[kind], again.values[kind])


def test_gates_need_no_adapter_on_the_projections_they_lie_on(monkeypatch):
    # The plan's signature says LoraLayer; the gate metric takes any module, so the run-time check is set aside here.
    monkeypatch.setattr(sensitivity, "compute_sensitivity", inspect.unwrap(compute_sensitivity))
    config = GQA()
    base = make_model(config)
    groups = find_groups(base, config)
    model = adapted(base, target_modules=("q_proj",))
    scored = score_model(model, LiveMask(model, groups), [make_batch()], "retain", prune_metric="gate", loss="nll")
    assert all((one > 0).all() for one in scored.values.values())


def test_a_removed_group_has_no_sensitivity_under_gates():
    model, _, live = masked(GQA())
    mask = make_mask(live.groups, {"kv_group": [[0], [2]], "ffn_channel": [[3], [8]]})
    live.set(mask)
    scored = score_model(model, live, [make_batch()], "retain", prune_metric="gate", loss="nll")
    for kind in KINDS:
        assert (scored.values[kind][~mask.kept[kind]] == 0).all()
        assert (scored.values[kind][mask.kept[kind]] > 0).all()


# --- the moving average ---


def sensitivities(value, shape=(2, 3)):
    return {kind: torch.full(shape, value, dtype=torch.float64) for kind in KINDS}


def test_the_first_average_is_the_first_score_whatever_beta_says():
    for beta in (0.0, 0.5, 0.9, 0.999):
        values = MovingAverage().advanced(sensitivities(7.0), beta).values()
        assert torch.allclose(values["kv_group"], torch.tensor(7.0, dtype=torch.float64))


def test_the_moving_average_weighs_scores_by_age_and_its_weights_sum_to_1():
    average, beta, scores = MovingAverage(), 0.8, [3.0, 5.0, 11.0]
    for one in scores:
        average = average.advanced(sensitivities(one), beta)
    weights = [beta**2, beta, 1.0]
    expected = sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)
    assert average.values()["ffn_channel"][1, 2].item() == pytest.approx(expected, rel=1e-12)
    assert average.weight == pytest.approx(1 - beta**3, rel=1e-12)


def test_there_is_no_average_before_the_first_score():
    with pytest.raises(ValueError, match="nothing has been scored yet"):
        SensitivityDict().scores(1e-6)


def small_groups():
    return find_groups(make_model(GQA()), GQA())


def random_score(seed=0):
    source = torch.Generator().manual_seed(seed)
    shapes = {"kv_group": (2, 4), "ffn_channel": (2, 24)}
    return Sensitivity(
        {kind: torch.rand(shape, generator=source, dtype=torch.float64) for kind, shape in shapes.items()}
    )


def test_normalised_sensitivities_have_mean_1_over_the_kept_groups_of_a_kind_and_0_at_removed_ones():
    kept = make_mask(small_groups(), {"kv_group": [[0], [3]], "ffn_channel": [[1, 2], []]})
    values = normalised(random_score(), kept)
    for kind in KINDS:
        assert values[kind][kept.kept[kind]].mean().item() == pytest.approx(1.0, rel=1e-12)
        assert (values[kind][~kept.kept[kind]] == 0).all()


def test_normalisation_takes_a_losss_scale_away_and_keeps_the_layers_apart():
    kept, score = full_mask(small_groups()), random_score()
    loud = Sensitivity({kind: 1e6 * one for kind, one in score.values.items()})
    deep = Sensitivity({kind: one * torch.tensor([[1.0], [9.0]]) for kind, one in score.values.items()})
    for kind in KINDS:
        assert torch.allclose(normalised(loud, kept)[kind], normalised(score, kept)[kind], rtol=1e-12)
        assert normalised(deep, kept)[kind][1].mean() > 5 * normalised(deep, kept)[kind][0].mean()


def test_a_set_on_which_nothing_matters_finds_all_groups_alike():
    kept = make_mask(small_groups(), {"kv_group": [[0], [0]]})
    nothing = Sensitivity({kind: torch.zeros_like(one) for kind, one in random_score().values.items()})
    values = normalised(nothing, kept)["kv_group"]
    assert values.dtype == torch.float64
    assert torch.equal(values, kept.kept["kv_group"].double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_score_is_left_out_counted_and_named_by_kind_and_layer(bad):
    kept = full_mask(small_groups())
    before = update_sensitivity_dict(SensitivityDict(), random_score(), "forget", kept=kept, beta=0.5)
    broken = random_score(1)
    broken.values["ffn_channel"][1, 5] = bad
    after = update_sensitivity_dict(before, broken, "forget", kept=kept, beta=0.5)
    assert (before.skipped, after.skipped) == (0, 1)
    assert nonfinite_layers(broken) == [("ffn_channel", 1)]
    assert nonfinite_layers(random_score()) == []
    assert after.forget is before.forget


def test_one_sets_score_moves_that_sets_average_alone():
    kept = full_mask(small_groups())
    forget = update_sensitivity_dict(SensitivityDict(), random_score(), "forget", kept=kept, beta=0.5)
    assert forget.retain.totals is None
    both = update_sensitivity_dict(forget, random_score(1), "retain", kept=kept, beta=0.5)
    assert both.forget is forget.forget
    expected = dual_score(both.forget.values()["kv_group"], both.retain.values()["kv_group"], 1e-6)
    assert torch.equal(both.scores(1e-6)["kv_group"], expected)
    above = both.candidates(0.5, 1e-6)["kv_group"]
    assert torch.equal(above, expected > 1.0)
    assert above.any()
    assert not above.all()


# --- dual score and share ---


def test_a_share_is_in_0_to_1_and_half_where_both_sets_care_alike():
    forget = torch.tensor([0.0, 1e-9, 1.0, 3.0, 1e6], dtype=torch.float64)
    retain = torch.tensor([1.0, 1e-9, 1.0, 1.0, 0.0], dtype=torch.float64)
    shares = share_of(dual_score(forget, retain, 1e-6))
    assert (shares >= 0).all()
    assert (shares < 1).all()
    assert shares[0] == 0
    assert shares[2].item() == pytest.approx(0.5, abs=1e-6)
    assert shares[3].item() == pytest.approx(0.75, abs=1e-6)
    assert shares[1] < 0.01  # epsilon: a group that nobody needs is not the forget set's


def test_the_dual_sensitivity_of_a_set_with_itself_is_1_and_a_losss_scale_does_not_move_it():
    base, groups = after_backward()
    for one in projections_of(groups):
        layer = base.get_submodule(one.module)
        gradient = adapter_gradient(layer)
        tenfold = AdapterGradient(10 * gradient.a, 10 * gradient.b)
        score = compute_dual_sensitivity(layer, tenfold, gradient, groups=one)
        assert torch.allclose(score, torch.ones_like(score), atol=1e-3)


def test_the_dual_sensitivity_is_the_ratio_of_importances_of_mean_1_from_adapters_or_from_gates():
    base, groups = after_backward()
    one = groups.layers["ffn_channel"][0].consumer
    layer = base.get_submodule(one.module)
    source = torch.Generator().manual_seed(2)
    forget, retain = (torch.randn(3, 1, 24, generator=source) for _ in range(2))
    means = [gate_importance(g, one, 1) / gate_importance(g, one, 1).mean() for g in (forget, retain)]
    assert torch.allclose(
        compute_dual_sensitivity(layer, forget, retain, 1e-3, groups=one), means[0] / (means[1] + 1e-3)
    )
    other = AdapterGradient(*(torch.randn(g.shape, generator=source) for g in adapter_gradient(layer)))
    expected = [restated(layer, g, one, 2, False) for g in (other, adapter_gradient(layer))]
    expected = [values / values.mean() for values in expected]
    found = compute_dual_sensitivity(layer, other, adapter_gradient(layer), 1e-3, groups=one, power=2)
    assert torch.allclose(found, expected[0] / (expected[1] + 1e-3), rtol=1e-4)


# --- refusals ---


def refusal(*arguments, **named):
    """The message of the function itself: the run-time check of its signature would come first."""
    with pytest.raises(ValueError) as caught:
        inspect.unwrap(compute_sensitivity)(*arguments, **named)
    return str(caught.value)


def test_what_a_sensitivity_cannot_be_computed_from_is_refused():
    base, groups = after_backward()
    consumer, producer = groups.layers["ffn_channel"][0].consumer, groups.layers["ffn_channel"][0].producers[0]
    layer, gate = base.get_submodule(consumer.module), torch.ones(2, 1, 24)
    assert "has groups of kind ffn_channel, but is_attn is True" in refusal(layer, True, "forget", groups=consumer)
    assert "dataset_type is 'holdout'" in refusal(layer, False, "holdout", groups=consumer)
    assert "prune_metric is 'taylor'" in refusal(layer, False, "forget", "taylor", groups=consumer)
    assert "gate_gradient is read at attention" in refusal(layer, False, "forget", "gate", groups=consumer)
    assert "activation is read at attention" in refusal(layer, False, "forget", "activation", groups=consumer)
    assert "gate_gradient is read at attention output and down" in refusal(
        base.get_submodule(producer.module), False, "forget", "gate", groups=producer, gate_gradient=gate
    )
    assert "metric grad is read after backward over the frozen weights" in refusal(
        layer, False, "forget", "grad", groups=consumer
    )
    assert "carries no adapter" in refusal(layer.get_base_layer(), False, "forget", "lora", groups=consumer)
    base.zero_grad(set_to_none=True)
    assert "the adapter has no gradients" in refusal(layer, False, "forget", groups=consumer)


def test_metric_lora_refuses_several_adapters_and_dora():
    model, groups, _ = masked(GQA())
    one = groups.layers["ffn_channel"][0].consumer
    layer = model.get_base_model().get_submodule(one.module)
    layer.use_dora["default"] = True
    with pytest.raises(ValueError, match="one plain adapter"):
        adapter_gradient(layer)
    layer.use_dora["default"] = False
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"found \['default', 'second'\]; use metric gate"):
        adapter_gradient(layer)
