"""Command line: every error in three lines, every flag a setting, and no library loaded to say so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from loraprune import cli
from loraprune.errors import UserError
from loraprune.records import RunReport
from loraprune.setting import flag
from loraprune.settings import DECLARED, Settings, as_values

ROOT = Path(__file__).parents[1]
UNLEARN = ["unlearn", "m", "--forget", "f.jsonl", "--retain", "r.jsonl", "--output", "out"]
PRUNE = ["prune", "m", "--data", "d.txt", "--sparsity", "0.3", "--output", "out"]
HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "rich", "matplotlib", "scipy", "sklearn")


def refused(*arguments):
    with pytest.raises(UserError) as caught:
        cli.settings_of(list(arguments))
    return str(caught.value)


def toml(folder, values):
    path = folder / "settings.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return str(path)


def in_a_new_process(*arguments, program=("-m", "loraprune")):
    code = [sys.executable, *program, *arguments]
    return subprocess.run(code, capture_output=True, text=True, cwd=ROOT, timeout=120)


# --- errors ---


@pytest.mark.parametrize("threshold", ["-0.1", "1.1"])
def test_a_threshold_outside_0_to_1_is_refused(threshold):
    assert refused(*UNLEARN, "--unlearning-threshold", threshold) == (
        f"error  unlearning_threshold is {threshold}; it must be a number in [0, 1].\n"
        "why    A group may go only if its share S / (1 + S) is above this; 0.5 means it matters more to forget. Holds "
        "where sparsity is unset or the order is share.\n"
        "fix    set --unlearning-threshold to a number in [0, 1] (default 0.5)."
    )


@pytest.mark.parametrize("sparsity", ["0", "1", "1.5"])
@pytest.mark.parametrize("command", [UNLEARN, PRUNE])
def test_a_sparsity_outside_0_to_1_is_refused(command, sparsity):
    assert refused(*command, "--sparsity", sparsity) == (
        f"error  sparsity is {float(sparsity)}; it must be a number in (0, 1).\n"
        "why    Removed parameters / all parameters to reach; unset: prune only until P(forget) is in the band.\n"
        "fix    set --sparsity to a number in (0, 1)."
    )


def test_a_misspelt_flag_is_refused_with_the_nearest_one():
    assert refused(*UNLEARN, "--sparcity", "0.5") == (
        "error  there is no flag --sparcity.\n"
        "why    a misspelt flag would be ignored, and the run would not be the one you asked for.\n"
        "fix    did you mean --sparsity?"
    )


def test_a_misspelt_flag_is_named_although_its_value_took_the_place_of_the_model():
    assert "there is no flag --sparcity" in refused("unlearn", "--sparcity=0.5", "m")
    assert "there is no flag --sparcity" in refused("unlearn", "--sparcity", "0.5", "m")


def test_a_flag_that_resembles_nothing_points_to_the_help():
    assert refused(*UNLEARN, "--zzz").endswith("fix    loraprune unlearn --help lists all flags.")


def test_flags_are_not_abbreviated():
    assert refused(*UNLEARN, "--spars", "0.5").endswith("did you mean --sparsity?")


def test_a_misspelt_setting_in_a_file_is_refused_with_the_nearest_one(tmp_path):
    assert refused(*UNLEARN, "--config", toml(tmp_path, {"sparcity": 0.5})) == (
        "error  there is no setting sparcity.\n"
        "why    a misspelt setting would be ignored, and the run would not be the one you asked for.\n"
        "fix    did you mean sparsity?"
    )


def test_a_wrong_value_in_a_file_is_refused_although_a_flag_overrides_it(tmp_path):
    file = toml(tmp_path, {"sparsity": 1.5})
    assert "sparsity is 1.5" in refused(*UNLEARN, "--config", file, "--sparsity", "0.5")


def test_a_missing_settings_file_is_named():
    assert "the settings file no.toml cannot be read" in refused(*UNLEARN, "--config", "no.toml")


def test_what_is_missing_is_named():
    assert refused("unlearn", "m", "--retain", "r", "--output", "o") == (
        "error  --forget is missing.\n"
        "why    the command needs MODEL, --forget, --retain, --output.\n"
        "fix    add --forget; --help says what each takes."
    )
    assert refused("prune").startswith("error  MODEL, --data, --sparsity, --output are missing.")
    assert refused("evaluate", "m", "--forget", "f").startswith("error  --retain is missing.")


def test_text_where_a_number_is_wanted_is_refused():
    assert refused(*UNLEARN, "--sparsity", "half") == (
        "error  sparsity is 'half'; it must be a number in (0, 1).\n"
        "why    Removed parameters / all parameters to reach; unset: prune only until P(forget) is in the band.\n"
        "fix    set --sparsity to a number in (0, 1)."
    )
    assert "seed is '1.5'; it must be a whole number >= 0." in refused(*UNLEARN, "--seed", "1.5")


def test_a_word_outside_a_choice_is_refused():
    assert "metric is 'taylor'; it must be one of lora, gate, " in refused(*UNLEARN, "--metric", "taylor")


def test_a_column_without_a_role_is_refused():
    assert "columns is 'question'; it must be pairs role=column." in refused(*UNLEARN, "--columns", "question")


def test_a_flag_without_its_value_is_refused():
    assert refused(*UNLEARN, "--seed") == (
        "error  --seed: expected one argument.\n"
        "why    the command line cannot be read as it stands.\n"
        "fix    loraprune unlearn --help shows how each flag is written."
    )


def test_a_word_beside_the_model_is_refused():
    assert refused(*UNLEARN, "n").startswith("error  no flag takes 'n'.")


def test_a_word_that_is_no_flag_is_not_written_as_one():
    assert refused("status", "--output", "out") == (
        "error  there is no flag --output.\n"
        "why    loraprune status takes it without a flag, as DIR.\n"
        "fix    leave --output out; what follows it stays."
    )
    assert "takes it without a flag, as MODEL." in refused("unlearn", "--model", "m")


def test_a_status_takes_a_folder_and_no_settings():
    assert refused("status").startswith("error  DIR is missing.\nwhy    the command needs DIR.")
    assert "loraprune status takes no --seed." in refused("status", "out", "--seed", "1")
    assert "there is no flag --config." in refused("status", "out", "--config", "c.toml")
    assert "did you mean --json?" in refused("status", "out", "--jsn")
    assert cli.settings_of(["status", "out"]) == Settings(output="out")


def test_an_unknown_command_is_refused_with_the_nearest_one():
    assert refused("unlern", "m") == (
        "error  there is no command unlern.\n"
        "why    the first word names the command: unlearn, prune, evaluate, attack, status, plan, demo.\n"
        "fix    did you mean loraprune unlearn?"
    )


def test_no_command_at_all_is_refused():
    assert refused().startswith("error  no command was given.")
    assert refused("--debug").startswith("error  no command was given.")


def test_compression_takes_no_forget_set(tmp_path):
    expected = "it is a setting of loraprune unlearn, evaluate, attack, and would be ignored here."
    assert expected in refused(*PRUNE, "--forget", "f.jsonl")
    assert expected in refused(*PRUNE, "--config", toml(tmp_path, {"forget": "f.jsonl"}))


def test_unlearning_takes_no_training_text():
    assert "loraprune unlearn takes no --data." in refused(*UNLEARN, "--data", "d.txt")


# --- exit codes ---


def fails_with(error):
    def action():
        raise error

    return action


def test_a_users_error_is_three_lines_and_code_2(capsys):
    assert cli.exit_code(fails_with(UserError("what.", "why.", "fix.")), debug=False) == 2
    assert capsys.readouterr() == ("", "error  what.\nwhy    why.\nfix    fix.\n")


def test_debug_adds_the_traceback(capsys):
    assert cli.exit_code(fails_with(UserError("what.", "why.", "fix.")), debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interruption_is_one_line_and_code_130(capsys):
    assert cli.exit_code(fails_with(KeyboardInterrupt()), debug=False) == 130
    assert capsys.readouterr() == ("", "interrupted; the same command resumes the run.\n")


def test_a_bug_is_a_traceback_and_code_1(capsys):
    assert cli.exit_code(fails_with(ZeroDivisionError("of ours")), debug=False) == 1
    assert "ZeroDivisionError: of ours" in capsys.readouterr().err


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 3)])
def test_a_run_that_missed_its_goal_says_so_by_its_code(met, code):
    assert cli.code_of(RunReport(Path("out"), {}, met)) == code


def test_main_returns_the_code_of_an_error(capsys):
    assert cli.main(["prune"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


# --- settings ---


def test_what_is_required_is_enough_and_the_rest_is_default():
    expected = Settings(model="m", forget="f.jsonl", retain="r.jsonl", output="out")
    assert cli.settings_of(UNLEARN) == expected


def test_compression_has_no_floor_unless_one_is_set():
    assert cli.settings_of(PRUNE).min_retain_performance == 0
    assert cli.settings_of([*PRUNE, "--min-retain-performance", "0.8"]).min_retain_performance == 0.8


def typed(name, value):
    """Return a setting as flags."""
    kind = DECLARED[name].kind
    if kind is bool:
        return [flag(name) if value else flag(name).replace("--", "--no-", 1)]
    if kind is tuple:
        return [flag(name), ",".join(value)]
    if kind is dict:
        return [part for role, column in value.items() for part in (flag(name), f"{role}={column}")]
    return [flag(name), str(value)]


OTHER_VALUES = {
    **{"trust_remote_code": True, "allow_overlap": True, "gradient_checkpointing": True, "show_examples": True},
    **{"group_by_length": True, "train_on_prompt": True},
    **{"dtype": "float16", "device": "cpu", "metric": "lora", "score_loss": "nll", "forget_loss": "ga"},
    **{"columns": {"prompt": "q", "answer": "a=b"}, "target_modules": ("q_proj", "v_proj"), "report_to": ("wandb",)},
    **{
        "score_power": 2,
        "widths": "per_layer",
        "template": "Q: {prompt}\nA: ",
        "already_forgotten": ("a.jsonl",),
        "max_guard_loss_ratio": 1.5,
    },
}


def other_value(name):
    """Return a value that is not the setting's default."""
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    one = DECLARED[name]
    if one.kind is bool:
        return not one.default
    if isinstance(one.allowed, tuple):
        return next(value for value in one.allowed if value != one.default)
    return {str: "x", int: 11, float: 0.25, tuple: ("x",)}[one.kind]


@pytest.mark.parametrize("command", ["unlearn", "prune"])
def test_every_flag_sets_its_setting(command):
    values = {name: other_value(name) for name in cli.COMMANDS[command].settings}
    flags = [part for name, value in values.items() if name != "model" for part in typed(name, value)]
    assert cli.settings_of([command, "x", *flags]) == Settings(**values)


def test_lists_are_written_with_commas_repeated_or_in_brackets():
    for words in (["q_proj,v_proj"], ["q_proj", "v_proj"], ["[q_proj, v_proj]"]):
        flags = [part for word in words for part in ("--target-modules", word)]
        assert cli.settings_of([*UNLEARN, *flags]).target_modules == ("q_proj", "v_proj")


def test_the_model_may_follow_the_flags():
    assert cli.settings_of([UNLEARN[0], *UNLEARN[2:], "m"]) == cli.settings_of(UNLEARN)


def test_a_flag_overrides_the_file(tmp_path):
    file = toml(
        tmp_path, {"forget": "f", "retain": "r", "output": "o", "seed": 3, "sparsity": 0.2, "forget_loss": "ga"}
    )
    settings = cli.settings_of(["unlearn", "m", "--config", file, "--seed", "7"])
    assert (settings.seed, settings.sparsity, settings.forget_loss, settings.output) == (7, 0.2, "ga", "o")


@pytest.mark.parametrize("arguments", [UNLEARN, PRUNE])
def test_the_settings_file_of_a_run_gives_the_same_run(arguments, tmp_path):
    settings = cli.settings_of(arguments)
    assert cli.settings_of([arguments[0], "--config", toml(tmp_path, as_values(settings))]) == settings


def test_the_settings_file_of_a_run_serves_its_evaluation(tmp_path):
    file = toml(tmp_path, as_values(cli.settings_of(UNLEARN)))
    settings = cli.settings_of(["evaluate", "out/model", "--config", file])
    assert (settings.model, settings.forget) == ("out/model", "f.jsonl")


def test_the_demo_has_defaults_of_its_own():
    settings = cli.settings_of(["demo"])
    assert (settings.output, settings.seed, settings.show_examples) == ("", 0, True)
    settings = cli.settings_of(["demo", "--seed", "4", "--output", "x", "--no-show-examples"])
    assert (settings.output, settings.seed, settings.show_examples) == ("x", 4, False)


# --- what is not loaded ---

PROBE = """
import sys
from loraprune.cli import main
try:
    code = main({arguments!r})
except SystemExit as stop:
    code = stop.code
import json
print(json.dumps([code, [name for name in {heavy!r} if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *[([command, "--help"], 0) for command in cli.COMMANDS],
        ([*UNLEARN, "--sparcity", "0.5"], 2),
        ([*UNLEARN, "--sparsity", "2"], 2),
        (["evaluate"], 2),
    ],
)
def test_help_and_errors_load_no_library(arguments, code):
    ran = in_a_new_process("-c", PROBE.format(arguments=arguments, heavy=HEAVY), program=())
    assert json.loads(ran.stdout.splitlines()[-1]) == [code, []]


def test_help_shows_sentence_default_and_range():
    shown = " ".join(in_a_new_process("unlearn", "--help").stdout.split())
    assert "usage: loraprune unlearn MODEL --forget FORGET --retain RETAIN --output OUTPUT [settings]" in shown
    assert "Rank of the adapters. Default: 8. It must be a whole number >= 1." in shown
    assert "--allow-overlap, --no-allow-overlap" in shown
    assert "(80%)" in shown


def test_the_module_runs_as_the_script_does():
    ran = in_a_new_process("prune", "m")
    assert (ran.returncode, ran.stderr.splitlines()[0]) == (2, "error  --data, --sparsity, --output are missing.")


# --- the plan's scripts ---


@pytest.fixture
def scripts(monkeypatch):
    """Return the script prune.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT))
    from loraprune import scripts

    return scripts


def test_the_plans_names_stand_for_settings(scripts):
    values = {"base_model": "m", "data_path": "d", "output_dir": "o", "ratio": 0.5, "cutoff_len": 64, "prune_freq": 5}
    settings = scripts.settings_of(values | {"prune_metric": "lora", "lora_r": 4, "lora_target_modules": ["q_proj"]})
    assert (settings.model, settings.data, settings.output, settings.sparsity) == ("m", "d", "o", 0.5)
    assert (settings.max_length, settings.prune_every, settings.metric, settings.lora_rank) == (64, 5, "lora", 4)
    assert settings.target_modules == ("q_proj",)


def test_a_batch_size_counts_for_both_sets_unless_one_is_given_apart(scripts):
    values = {"base_model": "m", "forget_dataset": "f", "retain_dataset": "r", "output_dir": "o", "batch_size": 4}
    settings = scripts.settings_of(values)
    assert (settings.forget_batch_size, settings.retain_batch_size) == (4, 4)
    settings = scripts.settings_of(values | {"forget_batch_size": 2})
    assert (settings.forget_batch_size, settings.retain_batch_size) == (2, 4)


def test_a_batch_size_serves_compression_as_well(scripts):
    values = {"base_model": "m", "data_path": "d", "output_dir": "o", "ratio": 0.5, "batch_size": 4}
    assert scripts.settings_of(values).retain_batch_size == 4


def test_the_plans_flags_are_read_with_underscores_and_dashes(scripts):
    parser = scripts.script_parser("prune.py", "", DECLARED)
    arguments = ["--base_model", "m", "--forget-dataset=f-g", "--unlearning_threshold", "0.6", "--no-allow-overlap"]
    expected = {"base_model": "m", "forget_dataset": "f-g", "unlearning_threshold": 0.6, "allow_overlap": False}
    assert scripts.read(parser, arguments) == expected


def test_the_plans_script_and_the_command_line_ask_for_the_same_run(scripts):
    values = {"base_model": "m", "forget_dataset": "f.jsonl", "retain_dataset": "r.jsonl", "output_dir": "out"}
    assert scripts.settings_of(values | {"data_path": ""}) == cli.settings_of(UNLEARN)


def test_train_refuses_what_is_missing_or_unknown(scripts):
    with pytest.raises(UserError, match="--base_model, --retain_dataset, --output_dir are missing"):
        scripts.train(forget_dataset="f")
    with pytest.raises(UserError, match="there is no setting num_epoch"):
        scripts.train(base_model="m", data_path="d", output_dir="o", num_epoch=3)


@pytest.mark.parametrize("script", ["prune.py", "inference.py"])
def test_the_scripts_end_with_the_same_errors(script):
    ran = in_a_new_process("--base_modle", "m", program=(script,))
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1] == "fix    did you mean --base_model?"
    assert "--base_model" in in_a_new_process("--help", program=(script,)).stdout


def test_an_evaluation_says_what_changed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import inference

    before = {"forget": ([0.8, 1.0], [0, 1]), "retain": ([0.8, 0.8], [0, 0])}
    after = {"forget": ([0.0, 0.2], [0, 1]), "retain": ([0.76, 0.76], [0, 0])}
    assert inference.changes(before, after) == [
        "performance drop on forget    0.8000   (0.8000 to 0.8000)  P before - P after, on the rows given: 2 (2 facts)",
        "retention on retain           0.9500   P after / P before, on the rows given: 2 (1 fact)",
        "unlearning efficiency        16.0000   drop / max(1 - retention, 0.01)",
        "Rows of the retain set that were trained on show less of a loss than rows that nothing was trained on.",
    ]
