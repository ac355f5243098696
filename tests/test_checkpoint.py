"""A run's state between two steps goes to disk and comes back whole, without a pickle."""

import dataclasses
import json

import pytest
import torch
from conftest import FAMILY_CONFIGS, KINDS, make_mask, masked

from loraprune import checkpoint
from loraprune.checkpoint import Point, RunState, load_state, moments_of, restore_moments, restore_random, save_state
from loraprune.errors import UserError
from loraprune.pruning import restore_state, take_state
from loraprune.records import Group, Look, Removal
from loraprune.sensitivity import MovingAverage, SensitivityDict

REMOVALS = [
    Removal(Group(0, "ffn_channel", 3), 0.1 + 0.2, 1 / 3, 2e-308, 5),
    Removal(Group(1, "kv_group", 2), None, None, 1.0, 9),
]

LOOK = Look(0.1, 1 / 3, (0.1 + 0.2, 0.5), 2e-3, None, 1.5, (0.25, 0.75), {"kv_group": (4, 3), "ffn_channel": (23, 24)})


@pytest.fixture
def model_and_mask():
    model, _, live = masked(FAMILY_CONFIGS["llama_gqa"]())
    live.set(make_mask(live.groups, {"ffn_channel": [[3], []], "kv_group": [[], [2]]}))
    return model, live


def make_optimizer(model):
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)


def train(model, optimizer, steps):
    """Steps on a loss that draws random numbers, so that random state matters too."""
    for _ in range(steps):
        loss = sum((one * torch.rand_like(one)).square().sum() for one in model.parameters() if one.requires_grad)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def point(model, optimizer):
    return Point(take_state(model), moments_of(optimizer))


def save(folder, run_state, model, optimizer=None):
    """The state of a model that is itself the point to roll back to."""
    now = point(model, optimizer or make_optimizer(model))
    save_state(folder, run_state, now, now)
    return now


def test_what_survivors_are_multiplied_by_comes_back_with_the_mask(tmp_path, model_and_mask):
    model, live = model_and_mask
    live.set(dataclasses.replace(live.value, factors={kind: torch.tensor([1.25, 1.0]) for kind in KINDS}))
    saved = save(tmp_path / "state", make_state(live), model)
    found = load_state(tmp_path / "state").now.state
    assert found.equals(saved.state) and found.mask.factor("kv_group", 0) == 1.25
    live.set(dataclasses.replace(live.value, factors={kind: torch.tensor([1.25, 1.5]) for kind in KINDS}))
    assert not take_state(model).equals(found)
    restore_state(model, found)
    assert take_state(model).equals(found)
    live.set(dataclasses.replace(live.value, factors={}))
    assert not take_state(model).equals(found) and not found.equals(take_state(model))


def averages(live, seed):
    source = torch.Generator().manual_seed(seed)
    return {kind: torch.rand(live.value.kept[kind].shape, generator=source, dtype=torch.float64) / 3 for kind in KINDS}


def make_state(live, **changes):
    scored = SensitivityDict(
        MovingAverage(averages(live, 1), 0.875), MovingAverage(averages(live, 2), 1 - 0.9**3), skipped=2
    )
    values = {"step": 9, "main_end": 14, "end": 18, "ended_by": "floor", "forgetting": False, "forget_weight": 0.125}
    values |= {"skipped": 2, "breaks": {"floor": 3}, "good_look": LOOK, "largest_step": 0.1 + 0.2}
    values |= {"began_well": True, "lacks_room": True}
    return RunState(**{**values, "removals": list(REMOVALS), "sensitivities": scored, **changes})


def test_where_nothing_was_saved_there_is_no_state(tmp_path):
    assert load_state(tmp_path / "state") is None


def test_a_state_of_before_there_was_an_end_is_not_gone_on_with(tmp_path, model_and_mask):
    model, live = model_and_mask
    save(tmp_path / "state", make_state(live), model, make_optimizer(model))
    path = tmp_path / "state" / "state.json"
    path.write_text(json.dumps({name: one for name, one in json.loads(path.read_text()).items() if name != "end"}))
    with pytest.raises(UserError, match="saved by an earlier release"):
        load_state(tmp_path / "state")


def test_everything_that_decides_what_comes_next_comes_back_bit_for_bit(tmp_path, model_and_mask):
    model, live = model_and_mask
    optimizer = make_optimizer(model)
    train(model, optimizer, 2)
    saved = make_state(live)
    state = save(tmp_path / "state", saved, model, optimizer).state
    loaded = load_state(tmp_path / "state")
    found, weights = loaded.run_state, loaded.now.state
    for name in (one.name for one in dataclasses.fields(RunState) if one.name != "sensitivities"):
        assert getattr(found, name) == getattr(saved, name)
    assert found.sensitivities.skipped == 2
    for one, other in (
        (found.sensitivities.forget, saved.sensitivities.forget),
        (found.sensitivities.retain, saved.sensitivities.retain),
    ):
        assert one.weight == other.weight
        assert all(torch.equal(one.totals[kind], other.totals[kind]) for kind in KINDS)
        assert all(one.totals[kind].dtype == torch.float64 for kind in KINDS)
    assert weights.trained.keys() == state.trained.keys()
    assert all(torch.equal(weights.trained[name], one) for name, one in state.trained.items())
    for kind in KINDS:
        assert weights.mask.kept[kind].dtype == torch.bool
        assert torch.equal(weights.mask.kept[kind], live.value.kept[kind])


def test_averages_that_were_never_made_come_back_as_none(tmp_path, model_and_mask):
    model, _ = model_and_mask
    save(tmp_path / "state", RunState(), model)
    assert load_state(tmp_path / "state").run_state == RunState()


def test_the_point_to_roll_back_to_is_kept_apart_from_the_model_as_it_is(tmp_path, model_and_mask):
    model, live = model_and_mask
    optimizer = make_optimizer(model)
    train(model, optimizer, 1)
    good = point(model, optimizer)
    train(model, optimizer, 2)
    live.set(make_mask(live.groups, {"ffn_channel": [[3, 5], [1]]}))
    now = point(model, optimizer)
    save_state(tmp_path / "state", make_state(live), now, good)
    loaded = load_state(tmp_path / "state")
    for found, saved in ((loaded.now, now), (loaded.good, good)):
        assert all(torch.equal(found.state.trained[name], one) for name, one in saved.state.trained.items())
        assert all(torch.equal(found.moments[name], one) for name, one in saved.moments.items())
        assert found.moments.keys() == saved.moments.keys()
        assert all(torch.equal(found.state.mask.kept[kind], saved.state.mask.kept[kind]) for kind in KINDS)
    assert not torch.equal(loaded.now.moments["0.exp_avg"], loaded.good.moments["0.exp_avg"])


def test_moments_that_were_taken_do_not_change_with_the_optimizer_and_come_back_bit_for_bit(model_and_mask):
    model, _ = model_and_mask
    optimizer = make_optimizer(model)
    train(model, optimizer, 1)
    taken, state = moments_of(optimizer), take_state(model)
    kept = {name: one.clone() for name, one in taken.items()}
    generator = torch.get_rng_state()
    train(model, optimizer, 2)
    expected = take_state(model)
    assert all(torch.equal(taken[name], one) for name, one in kept.items())
    for _ in range(2):  # going back leaves the point itself as it was
        restore_state(model, state)
        restore_moments(optimizer, taken)
        torch.set_rng_state(generator)
        train(model, optimizer, 2)
        for name, one in take_state(model).trained.items():
            assert torch.equal(one, expected.trained[name])


def test_without_moments_the_optimizer_is_as_fresh(model_and_mask):
    model, _ = model_and_mask
    optimizer = make_optimizer(model)
    train(model, optimizer, 2)
    restore_moments(optimizer, {})
    assert moments_of(optimizer) == {}


def test_a_run_without_a_forget_set_has_the_retain_average_alone(tmp_path, model_and_mask):
    model, live = model_and_mask
    scored = SensitivityDict.of(None, averages(live, 2))
    save(tmp_path / "state", make_state(live, sensitivities=scored), model)
    found = load_state(tmp_path / "state").run_state
    assert found.sensitivities.forget.totals is None
    assert torch.equal(found.sensitivities.retain.values()["kv_group"], scored.retain.values()["kv_group"])


def test_training_goes_on_from_the_disk_as_it_would_have_without_a_stop(tmp_path, model_and_mask):
    model, live = model_and_mask
    optimizer = make_optimizer(model)
    train(model, optimizer, 3)
    save(tmp_path / "state", make_state(live), model, optimizer)
    train(model, optimizer, 3)
    expected = take_state(model)

    other, _, other_live = masked(FAMILY_CONFIGS["llama_gqa"](), seed=5)
    saved = load_state(tmp_path / "state")
    restore_state(other, saved.now.state)
    fresh = make_optimizer(other)
    torch.rand(100)
    restore_moments(fresh, saved.now.moments)
    restore_random(saved.random)
    train(other, fresh, 3)
    for name, one in take_state(other).trained.items():
        assert torch.equal(one, expected.trained[name])
    assert torch.equal(other_live.value.kept["ffn_channel"], live.value.kept["ffn_channel"])


def test_an_optimizer_keeps_the_learning_rate_it_was_made_with(tmp_path, model_and_mask):
    model, live = model_and_mask
    optimizer = make_optimizer(model)
    train(model, optimizer, 1)
    save(tmp_path / "state", make_state(live), model, optimizer)
    fresh = make_optimizer(model)
    fresh.param_groups[0]["lr"] = 0.125
    restore_moments(fresh, load_state(tmp_path / "state").now.moments)
    assert fresh.param_groups[0]["lr"] == 0.125
    assert next(iter(fresh.state.values()))["step"] == 1


def test_a_state_holds_json_and_safetensors_and_nothing_else(tmp_path, model_and_mask):
    model, live = model_and_mask
    save(tmp_path / "state", make_state(live), model)
    assert {path.suffix for path in (tmp_path / "state").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_state_that_could_not_be_written_whole_leaves_the_one_before(tmp_path, model_and_mask, monkeypatch):
    model, live = model_and_mask
    save(tmp_path / "state", make_state(live, step=3), model)

    def interrupted(path, value):
        path.write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "state", make_state(live, step=9), model)
    assert load_state(tmp_path / "state").run_state.step == 3
