"""The parts of attacks: halves that share nothing, weights that are rounded, layers that are read, numbers by hand."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import make_model, save_checkpoint, world_values

from loraprune.attack_findings import _gain_words
from loraprune.attack_lens import lens
from loraprune.attack_relearn import _batches, _train, learning_rate, looks, relearn
from loraprune.attack_samples import contains
from loraprune.attack_weights import zero_smallest
from loraprune.attack_wording import all_options
from loraprune.attacked import AttackedModel, AttackRows, NotRun, Reading, split_halves
from loraprune.data import Row, load_rows
from loraprune.evaluate import answer_values
from loraprune.metrics import best_of, brought_back, mean_over_steps
from loraprune.settings import Settings


def attacked_model(path, settings, rows=(), **others):
    sets = AttackRows(**{"forget": rows, "taught": rows, "shown": rows, "hidden": rows, **others})
    return AttackedModel.of("unlearned", str(path), settings, sets)


# --- halves ---


def test_halves_share_no_fact_no_text_and_no_subject():
    def row(number, prompt, answer, fact_id=None, subject=None):
        return Row(number, (("user", prompt),), answer, fact_id=fact_id, subject=subject)

    rows = [
        *(row(number, f"q{number}", f"a{number}", fact_id=f"f{number // 3}") for number in range(30)),
        *(row(30 + number, f"s{number}", f"b{number}", subject=f"p{number % 4}") for number in range(20)),
        *(row(50 + number, "q0", "a0") for number in range(3)),
    ]
    for seed in range(5):
        shown, hidden = split_halves(rows, seed)
        assert len(shown) + len(hidden) == len(rows)
        assert abs(len(shown) - len(hidden)) <= 20
        for name in ("fact_id", "subject", "text"):
            ours, theirs = ({getattr(one, name) for one in half} - {None} for half in (shown, hidden))
            assert not ours & theirs
    assert split_halves(rows, 0) == split_halves(rows, 0) != split_halves(rows, 1)


def test_relearning_is_shown_no_row_of_the_half_that_it_is_asked_for(small_world, tmp_path):
    rows = load_rows(str(small_world / "forget.jsonl"), name="forget")
    shown, hidden = split_halves(rows, 0)
    settings = Settings(**world_values(small_world, tmp_path), attack_steps=12)
    model = attacked_model(small_world / "untouched", settings, shown=shown, hidden=hidden)
    ours, theirs = ({one.input_ids for one in model.examples(half)} for half in (shown, hidden))
    seen, batches = set(), _batches(model, shown, settings.forget_batch_size)
    for step in range(settings.attack_steps):
        batch = batches[step]["retain"]
        lengths = batch["attention_mask"].sum(1)
        seen |= {tuple(ids[:length].tolist()) for ids, length in zip(batch["input_ids"], lengths, strict=True)}
    assert seen == ours
    assert not seen & theirs
    assert not {one.fact_id for one in shown} & {one.fact_id for one in hidden}


def test_one_fact_has_no_other_half(run_folder):
    row = replace(load_rows(str(run_folder / "forget.jsonl"), name="forget")[0], number=1)
    assert split_halves([row], 0) == ([row], [])
    model = attacked_model(run_folder / "checkpoint", Settings(template="{prompt} "), [row], hidden=[])
    with pytest.raises(NotRun, match="one fact or one subject"):
        relearn(model, lambda *given, **others: None, "all")


def test_a_curve_is_looked_at_more_often_where_it_begins():
    assert looks(40) == [0, 1, 2, 5, 10, 20, 40]
    assert looks(1) == [0, 1]
    assert looks(100) == [0, 1, 2, 5, 10, 20, 50, 100]


def test_training_ends_where_the_loss_is_not_finite(run_folder):
    rows = load_rows(str(run_folder / "forget.jsonl"), name="forget")
    settings = Settings(template="{prompt} ", device="cpu", attack_steps=5)
    attacked = attacked_model(run_folder / "checkpoint", settings, rows)
    model = attacked.load()
    with torch.no_grad():
        model.get_decoder().norm.weight.fill_(torch.inf)
    assert list(_train(model, attacked, rows, 4, 1e-3)) == []


def test_all_weights_learn_at_a_tenth_of_the_adapters_rate_unless_a_rate_is_set():
    rates = {weights: learning_rate(Settings(learning_rate=0.01), weights) for weights in ("all", "lora")}
    assert rates == {"all": pytest.approx(0.001), "lora": 0.01}
    set_for_both = Settings(attack_learning_rate=0.5)
    assert {learning_rate(set_for_both, weights) for weights in ("all", "lora")} == {0.5}


# --- weights ---


def test_pruning_again_zeroes_the_smallest_weights_of_every_matrix_and_nothing_else(config):
    model = make_model(config)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    zero_smallest(model, 0.3)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ".layers." in name:
            gone = weight == 0
            assert gone.sum() == int(0.3 * weight.numel())
            assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
            assert torch.equal(weight[~gone], before[name][~gone])
        else:
            assert torch.equal(weight, before[name])


# --- the lens ---


def test_the_last_layer_of_the_lens_is_the_model_itself(config, tokenizer, tmp_path):
    model = make_model(config)
    folder = save_checkpoint(model, tokenizer, tmp_path)
    rows = [Row(n, (("user", f"Who is {n}?"),), answer) for n, answer in enumerate(("Ann.", "No one.", "A cello."))]
    attacked = attacked_model(folder, Settings(template="{prompt} ", device="cpu"), rows)
    values = answer_values(model, attacked.examples(rows), batch_size=2, pad_token_id=0)
    performances, exact = lens(model, attacked.examples(rows), batch_size=2, pad_token_id=0)
    assert performances.shape == (config.num_hidden_layers, 3)
    expected = (values.log_probability / values.tokens).exp().numpy()
    assert np.allclose(performances[-1], expected, atol=1e-6)
    assert np.array_equal(exact[-1], values.exact.numpy())
    assert not np.allclose(performances[0], expected, atol=1e-6)


# --- numbers ---


def test_the_best_of_k_is_the_mean_of_all_choices_of_k():
    values = np.random.default_rng(0).integers(0, 5, (4, 7)) / 4
    for drawn in range(1, 8):
        slowly = [np.mean([max(chosen) for chosen in combinations(row, drawn)]) for row in values]
        assert best_of(values, drawn) == pytest.approx(slowly)
    with pytest.raises(ValueError, match="best of 8"):
        best_of(values, 8)


def test_the_best_of_many_needs_no_big_numbers():
    hits = np.zeros((1, 64))
    hits[0, :3] = 1
    missed = np.prod([(61 - i) / (64 - i) for i in range(8)])  # pass@k: all eight among the 61 that miss
    assert best_of(hits, 8)[0] == pytest.approx(1 - missed)


def test_a_mean_over_steps_weighs_early_steps_more():
    late, early = [[0.0], [0.0], [1.0]], [[0.0], [1.0], [1.0]]
    assert mean_over_steps([0, 1, 3], late)[0] == pytest.approx(0.25)
    assert mean_over_steps([0, 1, 3], early)[0] == pytest.approx(0.75)
    assert mean_over_steps([0, 5, 40], [[0.3], [0.3], [0.3]])[0] == pytest.approx(0.3)
    assert mean_over_steps([0], [[0.3]])[0] == 0.3


def test_brought_back_is_a_share_of_what_is_gone():
    assert brought_back(0.2, 0.6, 1.0) == pytest.approx(0.5)
    assert brought_back(0.2, 0.1, 1.0) == pytest.approx(-0.125)
    assert brought_back(0.97, 0.99, 1.0) is None


def test_a_reading_tells_means_intervals_and_rows():
    values = Reading([0, 0, 2], [0.0, 0.2, 0.4], [0.5, 0.5, 0.8]).as_values()
    assert values["before"] == pytest.approx(0.2)
    assert values["after"] == pytest.approx(0.6)
    assert (values["rows"], values["facts"], values["known"]) == (3, 2, values["before"])
    low, high = values["after_interval"]
    assert low <= values["after"] <= high
    assert values["row_values"] == {"facts": [0, 0, 2], "before": [0.0, 0.2, 0.4], "after": [0.5, 0.5, 0.8]}


# --- questions ---


def test_an_answer_contains_a_fact_by_whole_words():
    row = Row(1, (("user", "Where?"),), "In Marsk.", facts=("Marsk",))
    assert contains(row, "it was MARSK, I think") == 1.0
    assert contains(row, "Marskton") == 0.0
    assert contains(replace(row, facts=()), "They say: in Marsk") == 1.0
    assert contains(replace(row, facts=()), "Marsk") == 0.0


def test_wrong_options_are_the_rows_own_or_those_of_other_facts():
    def row(number, answer, fact_id, **others):
        return Row(number, (("user", f"q{number}"),), answer, fact_id=fact_id, **others)

    own = row(1, "a", "f1", paraphrased_answer="b", perturbed_answers=("w", "x", "y", "z"))
    rows = [own, row(2, "c", "f2"), row(3, "d", "f2"), row(4, "D!", "f3"), row(5, "e", "f4")]
    options = all_options(rows, 0)
    assert options[0] == ["b", "w", "x", "y"]
    assert options[1][0] == "c"
    assert set(options[1][1:]) == {"a", "e"}  # not d, of its own fact, nor D!, which is d to a reader
    assert options == all_options(rows, 0)
    assert all_options([row(1, "a", "f1")], 0) == [["a"]]


# --- words ---


@pytest.mark.parametrize(
    "excess, interval, said",
    [(0.2, (0.1, 0.3), "gains 0.20 [0.10, 0.30] more"), (-0.2, (-0.3, -0.1), "gains 0.20 [0.10, 0.30] less")],
)
def test_the_interval_of_a_gain_has_the_sign_of_the_words(excess, interval, said):
    assert said in _gain_words({"excess": excess, "excess_interval": interval}, {"facts": 5})
