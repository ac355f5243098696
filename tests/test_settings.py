"""Settings: what is refused, in which words, and that values travel unchanged through TOML."""

import math

import pytest
import tomli_w

from loraprune.errors import UserError
from loraprune.ranges import Range
from loraprune.settings import DECLARED, Settings, as_values
from loraprune.settings_file import read_settings, settings_from


def refused(values):
    with pytest.raises(UserError) as caught:
        settings_from(values)
    return str(caught.value)


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_a_threshold_is_a_share_and_lies_in_0_to_1(threshold):
    assert refused({"unlearning_threshold": threshold}) == (
        f"error  unlearning_threshold is {threshold}; it must be a number in [0, 1].\n"
        "why    A group may go only if its share S / (1 + S) is above this; 0.5 means it matters more to forget. Holds "
        "where sparsity is unset or the order is share.\n"
        "fix    set --unlearning-threshold to a number in [0, 1] (default 0.5)."
    )


@pytest.mark.parametrize("threshold", [0, 0.5, 1])
def test_the_bounds_of_the_threshold_are_allowed(threshold):
    assert settings_from({"unlearning_threshold": threshold}).unlearning_threshold == threshold


@pytest.mark.parametrize("sparsity", [0.0, 1.0, 1.5, -0.5])
def test_a_sparsity_leaves_something_and_removes_something(sparsity):
    assert refused({"sparsity": sparsity}) == (
        f"error  sparsity is {sparsity}; it must be a number in (0, 1).\n"
        "why    Removed parameters / all parameters to reach; unset: prune only until P(forget) is in the band.\n"
        "fix    set --sparsity to a number in (0, 1)."
    )


def test_a_misspelt_setting_is_refused_with_the_nearest_name():
    assert refused({"sparcity": 0.5}) == (
        "error  there is no setting sparcity.\n"
        "why    a misspelt setting would be ignored, and the run would not be the one you asked for.\n"
        "fix    did you mean sparsity?"
    )


def test_a_setting_that_resembles_nothing_is_refused_too():
    assert refused({"zzz": 1}).endswith("fix    loraprune unlearn --help lists all settings.")


def test_a_setting_written_as_a_flag_is_not_its_name():
    assert refused({"prune-every": 3}).endswith("fix    did you mean prune_every?")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("sparsity", "half", "a number in (0, 1)"),
        ("sparsity", True, "a number in (0, 1)"),
        ("seed", 1.5, "a whole number >= 0"),
        ("seed", None, "a whole number >= 0"),
        ("model", 3, "text"),
        ("allow_overlap", 1, "true or false"),
        ("target_modules", "q_proj", "a list of names"),
        ("target_modules", [1], "a list of names"),
        ("columns", ["prompt"], "pairs role=column"),
        ("metric", "taylor", "one of lora, gate, grad, activation, magnitude, random"),
        ("metric", [], "one of lora, gate, grad, activation, magnitude, random"),
    ],
)
def test_a_value_of_another_kind_is_refused(name, value, allowed):
    assert refused({name: value}).startswith(f"error  {name} is {value!r}; it must be {allowed}.")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_infinite_or_undefined(value):
    assert "learning_rate" in refused({"learning_rate": value})


def test_a_direct_construction_checks_ranges_as_well():
    with pytest.raises(UserError, match="forget_retain_ratio is -1"):
        Settings(forget_retain_ratio=-1)


def test_ranges_say_which_bounds_belong_to_them():
    half_open = Range(0, 1, open_low=True)
    assert str(half_open) == "(0, 1]"
    assert [half_open.holds(value) for value in (0, 0.5, 1)] == [False, True, True]
    assert (str(Range(1)), str(Range(0, open_low=True))) == (">= 1", "> 0")


def test_the_plan_fixes_four_defaults():
    settings = Settings()
    assert settings.unlearning_threshold == 0.5
    assert settings.unlearning_epsilon == 1e-6
    assert settings.min_retain_performance == 0.9
    assert settings.forget_retain_ratio == 1.0


def test_settings_survive_a_file(tmp_path):
    settings = Settings(model="m", forget="f", sparsity=0.25, target_modules=("q_proj",), columns={"prompt": "q"})
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(as_values(settings)), encoding="utf-8")
    assert settings_from(read_settings(path)) == settings


def test_a_whole_number_serves_where_a_number_is_wanted():
    value = settings_from({"learning_rate": 1}).learning_rate
    assert (value, type(value)) == (1.0, float)


def test_a_settings_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError) as caught:
        read_settings(tmp_path / "no.toml")
    assert f"the settings file {tmp_path / 'no.toml'} cannot be read: No such file" in caught.value.what


def test_a_settings_file_that_is_not_toml_is_named_with_the_line(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("seed 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.toml is not TOML: .*line 1"):
        read_settings(path)


def test_every_setting_has_one_sentence_a_kind_and_a_default_that_can_be_shown():
    for name, one in DECLARED.items():
        assert one.text.endswith((".", ").")), name
        assert one.kind in (bool, int, float, str, tuple, dict), name
        assert one.default_text, name


def test_changed_names_what_differs():
    assert Settings(seed=1, sparsity=0.5).changed(Settings()) == ["sparsity", "seed"]
