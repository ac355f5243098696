"""Presets: `released` selects what the released code selects, `paper` by the paper's formula; what is given wins."""

import json
from dataclasses import fields, replace

import pytest
import torch
from conftest import SPECIAL, VOCABULARY, make_batch, masked, run_values
from transformers import LlamaConfig

from loraprune.cli import settings_of
from loraprune.errors import UserError
from loraprune.pipeline import run
from loraprune.presets import PRESETS
from loraprune.pruning import local_prune
from loraprune.rules import Rules, frozen_layers
from loraprune.schedule import last_sparsity, planned_sparsity
from loraprune.sensitivity import SensitivityDict, update_sensitivity_dict
from loraprune.settings import Settings, as_values
from loraprune.settings_file import settings_from
from loraprune.step_scores import StepScores

LAYERS, HEADS, CHANNELS = 11, 8, 20
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def deep_llama():
    """Heads that are not shared: what the released code was written for."""
    sizes = {"hidden_size": 32, "intermediate_size": CHANNELS, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes, **heads, **SPECIAL)


class Restated:
    """The released code's selection, formula by formula."""

    def __init__(self, model, ratio, total_steps, warmup, cooldown, every):
        self.layers = model.get_base_model().model.layers
        self.ratio, self.total, self.warmup, self.cooldown, self.every = ratio, total_steps, warmup, cooldown, every
        self.open = [i for i in range(LAYERS) if not (i < int(LAYERS * 0.1) or i == LAYERS - 1)]
        self.average = {(i, part): 0.0 for i in self.open for part in ("self_attn", "mlp")}
        self.mask = {key: torch.ones(HEADS if key[1] == "self_attn" else CHANNELS) for key in self.average}

    def module_sensitivity(self, module, is_attention, columns):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        gradient = b.grad @ a + b @ a.grad - b.grad @ a.grad
        values = (gradient * (b @ a * module.scaling["default"] + module.get_base_layer().weight)).abs().detach()
        values = values.t() if columns else values
        if is_attention:
            values = values.reshape(HEADS, -1)
        values = values.sum(1)
        return values / (torch.linalg.norm(values) + 1e-8)

    def update(self):
        for i, part in self.average:
            modules = getattr(self.layers[i], part)
            names = ATTENTION if part == "self_attn" else FEED_FORWARD
            new = sum(
                self.module_sensitivity(getattr(modules, name), part == "self_attn", name in ("o_proj", "down_proj"))
                for name in names
            )
            self.average[i, part] = self.average[i, part] * 0.9 + new * 0.1

    def scheduled(self, step):
        if step <= self.warmup * self.total:
            return 0.0
        if step > self.total - self.cooldown * self.total:
            return self.ratio
        left = 1 - (step - self.warmup * self.total) / (self.total - (self.cooldown + self.warmup) * self.total)
        return self.ratio + (0.0 - self.ratio) * left**3

    def prune(self, step):
        ratio = self.scheduled(step)
        if step % self.every or not 0.0 < ratio < self.ratio:
            return
        for key, mask in self.mask.items():
            count = int(mask.numel() * ratio)
            gone = torch.argsort(self.average[key] * mask)[:count]
            self.mask[key] = torch.ones_like(mask)
            self.mask[key][gone] = 0.0


def train_a_little(model, step):
    """Give the adapters gradients of a new batch, clipped as training clips them."""
    model.zero_grad()
    batch = make_batch(seed=step)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def move_adapters(model):
    with torch.no_grad():
        for one in model.parameters():
            if one.grad is not None:
                one -= 0.05 * one.grad


@pytest.mark.parametrize("seed", [0, 1])
def test_released_selects_what_the_released_code_selects_at_every_step(seed):
    model, _, live = masked(deep_llama(), seed)
    settings = Settings(preset="released", sparsity=0.5, warmup_steps=4, prune_every=4, prune_rounds=8, finish_steps=4)
    scores, known, rules = StepScores(model, live, settings), SensitivityDict(), Rules.of(settings)
    restated = Restated(model, 0.5, total_steps=40, warmup=0.1, cooldown=0.1, every=4)
    pruned = 0
    for step in range(40):  # the released code counts from 0 and prunes before the step is counted
        train_a_little(model, step + 100 * seed)
        restated.update()
        restated.prune(step)
        assert scores.due(step + 1)
        known = update_sensitivity_dict(
            known, scores.read(), "retain", kept=live.value, beta=settings.moving_average, norm=settings.score_norm
        )
        move_adapters(model)
        planned = planned_sparsity(step + 1, settings)
        if planned is not None:
            pruned += 1
            local_prune(model, known, planned, 1.0, rules=rules)
        for kind, part in (("kv_group", "self_attn"), ("ffn_channel", "mlp")):
            for layer in range(LAYERS):
                expected = restated.mask.get((layer, part), torch.ones(live.groups.count(kind)))
                assert live.value.kept[kind][layer].tolist() == expected.bool().tolist(), (step, layer, kind)
    assert pruned == 7  # the eighth would reach the ratio, and there the released code stops
    assert live.value.kept["kv_group"][1].sum() == HEADS - 3  # of 8 heads 50% is 4: it stops short
    assert live.value.kept["kv_group"][0].all() and live.value.kept["ffn_channel"][-1].all()


def test_paper_squares_and_sums_plainly_and_freezes_nothing():
    settings = Settings(preset="paper", sparsity=0.3)
    assert (settings.score_power, settings.score_norm, settings.third_term) == (2, "none", True)
    assert settings.frozen_layers == () and settings.schedule == "cubic"


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_given_wins_over_a_preset_also_where_it_equals_the_default(name):
    default = Settings()
    given = Settings(preset=name, metric=default.metric, moving_average=default.moving_average)
    assert (given.metric, given.moving_average) == (default.metric, default.moving_average)
    again = settings_from(as_values(given))
    assert again == given == replace(given)


def test_the_command_line_takes_a_preset_and_flags_override_it():
    line = ["prune", "m", "--data", "d", "--sparsity", "0.5", "--output", "o", "--preset", "released"]
    assert settings_of(line).score_norm == "module"
    assert settings_of([*line, "--score-norm", "mean"]).score_norm == "mean"


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="one of default, released, paper"):
        Settings(preset="relased")


# --- layers that are frozen, schedules that end ---


@pytest.mark.parametrize(
    "names, depth, frozen",
    [((), 4, set()), (("first-tenth", "-1"), 32, {0, 1, 2, 31}), (("0", "2"), 4, {0, 2}), (("first-tenth",), 9, set())],
)
def test_frozen_layers_are_named_by_number_from_either_end_or_as_a_tenth(names, depth, frozen):
    assert frozen_layers(Rules(frozen_layers=names), depth) == frozen


@pytest.mark.parametrize("name", ["4", "-5", "last", "1.5"])
def test_a_layer_that_is_not_there_cannot_be_frozen(name):
    with pytest.raises(UserError, match="the model has layers 0 to 3"):
        frozen_layers(Rules(frozen_layers=(name,)), 4)


def test_the_cubic_schedule_ends_at_the_goal_and_the_released_one_below_it():
    steps = {"warmup_steps": 10, "prune_every": 10, "prune_rounds": 8, "sparsity": 0.5}
    assert last_sparsity(Settings(**steps)) == 0.5
    released = last_sparsity(Settings(**steps, schedule="released"))
    assert released == 0.5 - 0.5 * (1 / 8) ** 3


def test_a_schedule_may_begin_above_nothing():
    settings = Settings(sparsity=0.5, initial_sparsity=0.2, warmup_steps=0, prune_every=1, prune_rounds=4)
    planned = [planned_sparsity(step, settings) for step in range(1, 5)]
    assert planned == pytest.approx([0.5 - 0.3 * (1 - turn / 4) ** 3 for turn in range(1, 5)])


def test_every_preset_names_settings_alone():
    known = {one.name for one in fields(Settings)}
    assert all(set(values) <= known for values in PRESETS.values())


# --- whole runs ---


def compression_values(run_folder, name, **changes):
    values = run_values(run_folder, name, min_retain_performance=0.0)
    values = {key: one for key, one in values.items() if key not in ("forget", "forget_target", "band", "sparsity")}
    values["data"] = values.pop("retain")
    return {**values, "prune_every": 2, "prune_rounds": 4, "learning_rate": 0.01, **changes}


def kept_by_layer(report):
    return json.loads((report.folder / "decision.json").read_text())["kept_by_layer"]


def test_a_released_run_leaves_what_its_schedule_ends_at_and_keeps_the_last_layer_whole(run_folder):
    values = compression_values(run_folder, "released", preset="released", sparsity=0.5)
    report = run(Settings(**values))
    ended = last_sparsity(Settings(**values))  # just below 0.5
    layers = kept_by_layer(report)
    assert layers == {"kv_group": [4 - int(4 * ended), 4], "ffn_channel": [24 - int(24 * ended), 24]}
    assert report.metrics["outcome"] == "budget_spent" and report.goal_met
    assert report.metrics["model"]["form"] == "per_layer"


@pytest.mark.parametrize("metric", ["lora", "gate", "grad", "magnitude", "random"])
def test_a_run_scored_from_training_takes_no_pass_of_its_own_and_meets_its_goal(run_folder, metric, monkeypatch):
    def refuse(*arguments, **others):
        raise AssertionError("a pass of its own was taken")

    monkeypatch.setattr("loraprune.trainer.score_model", refuse)
    values = compression_values(run_folder, f"steps-{metric}", metric=metric, score_from="training", score_every=1)
    report = run(Settings(**values, sparsity=0.15))
    assert report.goal_met and report.metrics["sparsity"] == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize("metric", ["grad", "activation", "magnitude", "random"])
def test_every_metric_prunes_a_model_by_passes_of_its_own(run_folder, metric):
    report = run(Settings(**compression_values(run_folder, f"passes-{metric}", metric=metric, sparsity=0.3)))
    assert report.goal_met


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"frozen_layers": ("0",)}, "widths is uniform"),
        ({"budget": "global", "attention_ratio": 0.5}, "one ranking over all groups"),
        ({"sparsity_of": "groups", "budget": "kind"}, "a share of every layer's groups"),
        ({"score_from": "training", "score_every": 11}, "nothing would ever be scored"),
        ({"preset": "released", "prune_rounds": 1}, "never prunes"),
        ({"preset": "released", "sparsity": 0.99}, "of a layer's groups cannot be had"),
        ({"sparsity_of": "groups", "budget": "layer", "sparsity": 0.1, "round_to": 8}, "between 0.3334 and 0.666"),
        ({"attention_ratio": 0.0, "sparsity": 0.3}, "cannot be reached"),
        ({"sparsity_of": "groups", "budget": "layer", "min_retain_performance": 0.5}, "a floor is set"),
        ({"score_from": "training", "metric": "activation"}, "reads no gradient"),
        ({"attention_unit": "q_head", "preset": "paper"}, "attention_unit is q_head, and preset is paper"),
        ({"attention_unit": "q_head", "preset": "released"}, "attention_unit is q_head, and preset is released"),
        ({"metric": "grad", "base_bits": 4}, "rounded weights have no gradient"),
        ({"initial_sparsity": 0.4}, "initial_sparsity is 0.4, and the goal is 0.3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_loaded(run_folder, changes, said):
    with pytest.raises(UserError, match=said):
        run(Settings(**compression_values(run_folder, "never", **{"sparsity": 0.3, **changes})))


@pytest.mark.parametrize(
    "changes",
    [
        {"score_from": "training"},
        {"metric": "magnitude"},
        {"score_norm": "none"},
        {"budget": "global"},
        {"attention_ratio": 0.0},
        {"preset": "released", "min_retain_performance": 0.0},
    ],
)
def test_what_cannot_tell_forget_from_retain_is_refused_for_unlearning(run_folder, changes):
    with pytest.raises(UserError, match="there is a forget set"):
        run(Settings(**run_values(run_folder, "never", **changes)))


@pytest.mark.parametrize(
    ("stricter", "said", "flags"),
    [
        ({"unlearning_threshold": 0.6}, "unlearning_threshold is 0.6, and", "--unlearning-threshold out"),
        (
            {"minimum_forget_sensitivity": 0.9},
            "minimum_forget_sensitivity is 0.9, and",
            "--minimum-forget-sensitivity out",
        ),
        (
            {"unlearning_threshold": 0.6, "minimum_forget_sensitivity": 0.9},
            "unlearning_threshold is 0.6 and minimum_forget_sensitivity is 0.9, and",
            "--unlearning-threshold and --minimum-forget-sensitivity out",
        ),
    ],
)
def test_what_would_hold_nothing_back_is_refused(run_folder, tmp_path, stricter, said, flags):
    asked = {**run_values(run_folder, "never"), **stricter, "sparsity": 0.2}
    with pytest.raises(UserError) as caught:
        run(Settings(**asked))
    assert said in str(caught.value) and flags in str(caught.value)
    by_share = run(Settings(**{**asked, "output": str(tmp_path / "by-share"), "order": "share"}))
    assert by_share.metrics["sparsity"] < 0.2
