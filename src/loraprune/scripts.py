"""Scripts: the entry `train(forget_dataset, retain_dataset, ...)`, under the plan's and LoRAPrune's names.

Reads    keyword arguments, or flags such as --base_model (dashes are read too)
Gives    train, and a script whose exit code is that of `loraprune unlearn` or `loraprune prune`
Source   the unlearning plan, section 1; LoRAPrune's prune.py, for the names
Symbols  -
"""

import sys
from collections.abc import Collection, Mapping
from typing import Any

from loraprune.cli import COMMANDS, Parser, add_debug, add_setting, code_of, complete, exit_code, given_values
from loraprune.records import RunReport
from loraprune.settings import Settings, setting_names, text_of

# The plan's names on the left, the settings they stand for on the right; all other settings keep their own names.
PLAN_NAMES: dict[str, tuple[str, ...]] = {
    "base_model": ("model",),
    "output_dir": ("output",),
    "reference_model": ("reference",),
    "forget_dataset": ("forget",),
    "retain_dataset": ("retain",),
    "holdout_dataset": ("holdout",),
    "data_path": ("data",),
    "cutoff_len": ("max_length",),
    "batch_size": ("forget_batch_size", "retain_batch_size"),
    "prune_metric": ("metric",),
    "ratio": ("sparsity",),
    "prune_freq": ("prune_every",),
    "lora_r": ("lora_rank",),
    "lora_target_modules": ("target_modules",),
}

SETS_OF_UNLEARNING = {"forget_dataset", "forget", "retain_dataset", "retain"}


def train(
    forget_dataset: str = "",
    retain_dataset: str = "",
    base_model: str = "",
    data_path: str = "",
    output_dir: str = "",
    **settings: Any,
) -> RunReport:
    """Unlearn the forget set, or compress on `data_path` where no forget set is given, and return the run's report.

    `settings` are further names of the plan (`ratio=0.3`) or settings under their own names (`seed=1`); a setting
    given under its own name wins.
    """
    named = {"forget_dataset": forget_dataset, "retain_dataset": retain_dataset, "base_model": base_model}
    checked = settings_of({**named, "data_path": data_path, "output_dir": output_dir, **settings})
    from loraprune.pipeline import run

    return run(checked)


def settings_of(values: Mapping[str, Any], command: str | None = None) -> Settings:
    """Return the checked settings that values under the plan's names, or settings' own, stand for; "" is unset.

    The command is `unlearn` where a forget or a retain set is given, else `prune`, unless it is named.
    """
    given = {name: value for name, value in values.items() if value not in (None, "")}
    if command is None:
        command = "unlearn" if given.keys() & SETS_OF_UNLEARNING else "prune"
    own = {name: value for name, value in given.items() if name not in PLAN_NAMES}
    return complete(command, {**_translated(given, COMMANDS[command].settings), **own}, spelt)


def _translated(values: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """Return the settings behind the plan's names; a name of several settings gives those that are taken."""
    return {
        setting: values[name]
        for name, settings in PLAN_NAMES.items()
        for setting in settings
        if name in values and (len(settings) == 1 or setting in taken)
    }


def spelt(setting: str) -> str:
    """Return a setting's flag as this script writes it."""
    return "--" + next((name for name, settings in PLAN_NAMES.items() if settings == (setting,)), setting)


def script_parser(program: str, text: str, settings: Collection[str]) -> Parser:
    """Return a parser of these settings under the plan's names and under their own."""
    parser = Parser(prog=program, description=text, usage=f"{program} [settings]")
    plan, own = parser.add_argument_group("names of the plan"), parser.add_argument_group("all settings")
    for name, behind in PLAN_NAMES.items():
        if set(behind) <= set(settings):
            add_setting(plan, behind[0], f"--{name}", text=" ".join(map(text_of, behind)))
    for name in settings:
        add_setting(own, name, f"--{name}")
    add_debug(parser)
    return parser


def read(parser: Parser, arguments: list[str]) -> dict[str, Any]:
    """Return the values that flags give, whether they are written with underscores or dashes."""
    values = given_values(parser.parse_args([underscored(one) for one in arguments]))
    return {name: value for name, value in values.items() if name != "debug"}


def underscored(argument: str) -> str:
    """Return a flag with underscores for dashes, except that of the prefix no-; other words come back as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    return "--" + (f"no-{name[3:]}" if name.startswith("no_") else name) + equals + value


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit code; None takes the process's own arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    taken = [name for name in setting_names() if name in COMMANDS["plan"].settings]  # of unlearn and prune together
    parser = script_parser("prune.py", "Unlearn a forget set, or compress a model.", taken)
    return exit_code(lambda: code_of(train(**read(parser, given))), debug="--debug" in given)
