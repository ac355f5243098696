"""Scripts: the entry `train(forget_dataset, retain_dataset, ...)`, under the plan's and LoRAPrune's names.

Reads    keyword arguments, or flags such as --base_model (dashes are read too)
Gives    train, and a script whose exit code is that of `loraprune unlearn` or `loraprune prune`
Source   the unlearning plan, section 1; LoRAPrune's prune.py, for the names
Symbols  -
"""

import os
import sys
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraprune.cli import COMMANDS, Parser, add_debug, add_setting, code_of, complete, exit_code, given_values
from loraprune.errors import UserError
from loraprune.length import IN_SHARES, needs_epochs
from loraprune.records import RunReport
from loraprune.settings import DECLARED, INSTRUCTION, Settings

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
    "nsamples": ("data_rows",),
    "num_epochs": ("epochs",),
    "val_set_size": ("withheld_rows",),
    "train_on_inputs": ("train_on_prompt",),
    "init_ratio": ("initial_sparsity",),
    "warmup_iters": ("warmup_share",),
    "cooldown_iters": ("finish_share",),
}
# LoRAPrune's names that stand for more than a setting under another name; _translated says what for.
WANDB: dict[str, tuple[str, str]] = {
    "wandb_project": ("WANDB_PROJECT", "Report to Weights & Biases, under this project."),
    "wandb_run_name": ("WANDB_NAME", "Report to Weights & Biases, under this name."),
    "wandb_watch": ("WANDB_WATCH", "Report to Weights & Biases; what it watches: false, gradients, parameters or all."),
    "wandb_log_model": (
        "WANDB_LOG_MODEL",
        "Report to Weights & Biases; whether it keeps the adapters: false, or end, as training leaves them.",
    ),
}
WANDB_WORDS = {"wandb_watch": ("false", "gradients", "parameters", "all"), "wandb_log_model": ("false", "end")}
IN_8BIT, RESUME = "load_in_8bit", "resume_from_checkpoint"

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
    given = {**named, "data_path": data_path, "output_dir": output_dir, **settings}
    checked = settings_of(given)
    os.environ.update(wandb_variables(given))
    from loraprune.pipeline import run

    return run(checked)


def settings_of(
    values: Mapping[str, Any], command: str | None = None, needed: tuple[str, ...] | None = None
) -> Settings:
    """Return the checked settings that values under the plan's names, or settings' own, stand for; "" is unset.

    The command is `unlearn` where a forget or a retain set is given, else `prune`, unless it is named; `needed` are
    the settings that must be given, None the command's own.
    """
    given = {name: value for name, value in values.items() if value not in (None, "")}
    if command is None:
        command = "unlearn" if given.keys() & SETS_OF_UNLEARNING else "prune"
    own = {name: value for name, value in given.items() if name not in {*PLAN_NAMES, *WANDB, IN_8BIT, RESUME}}
    translated = _translated(given, COMMANDS[command].settings) | own
    translated |= _resumed(given, translated) | _reported(given, translated) | _in_8bit(given)
    if command == "prune":
        translated = {"template": INSTRUCTION} | translated
    settings = complete(command, translated, spelt, needed)
    _refuse_shares(given, settings)
    return settings


def _refuse_shares(given: Mapping[str, Any], settings: Settings) -> None:
    """Raise UserError for a share of all steps that is given, be it the default, where no epochs are."""
    for name in IN_SHARES if settings.epochs is None else ():
        if written := next((one for one in (spelt(name)[2:], name) if one in given), None):
            raise needs_epochs(f"--{written}", spelt("epochs"))


def _in_8bit(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"base_bits": 8} if given.get(IN_8BIT) else {}


def _resumed(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the folder in which a run goes on, or the adapter from which one starts."""
    if RESUME not in given:
        return {}
    folder = Path(given[RESUME])
    if (folder / "config.toml").exists():
        if Path(settings.get("output", folder)).resolve() != folder.resolve():
            raise UserError(
                f"--{RESUME} names the run in {folder}, and --output_dir another folder.",
                "a run goes on in its own folder.",
                f"leave out --output_dir, or give --{RESUME} {folder / 'adapter'} to start from its adapter.",
            )
        return {"output": settings.get("output", str(folder))}
    if (folder / "adapter_config.json").exists():
        return {"adapter": str(folder)}
    raise UserError(
        f"--{RESUME} {folder} is neither a run nor an adapter.",
        "a run's folder holds config.toml, an adapter's adapter_config.json; without either nothing would be resumed.",
        f"correct --{RESUME}.",
    )


def _reported(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return where metrics go; raise UserError where a flag of Weights & Biases is given that could not be obeyed."""
    asked = [name for name in WANDB if name in given]
    if not asked:
        return {}
    for name, words in WANDB_WORDS.items():
        if name in given and given[name] not in (False, *words):
            raise UserError(
                f"--{name} is {given[name]!r}; it must be one of {', '.join(words)}.",
                "another word would be ignored; a run leaves no checkpoints of transformers' Trainer to be kept.",
                f"give one of these, or leave --{name} out.",
            )
    if find_spec("wandb") is None:
        raise UserError(
            f"--{asked[0]} is given, and wandb is not installed.",
            "the metrics would go nowhere.",
            "pip install wandb, or leave out " + ", ".join(f"--{name}" for name in asked) + ".",
        )
    return {"report_to": tuple(dict.fromkeys((*settings.get("report_to", ()), "wandb")))}


def wandb_variables(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables by which Weights & Biases is told what the flags say; none without them."""
    return {variable: str(values[name]) for name, (variable, _) in WANDB.items() if values.get(name)}


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
            add_setting(plan, behind[0], f"--{name}", text=" ".join(DECLARED[one].text for one in behind))
    if "report_to" in settings:
        _add_others(plan, settings)
    for name in settings:
        add_setting(own, name, f"--{name}")
    add_debug(parser)
    return parser


def _add_others(group: Any, settings: Collection[str]) -> None:
    """Add the flags of LoRAPrune that stand for no one setting."""
    if "base_bits" in settings:
        text = "Hold the base in 8 bits, as --base_bits 8 does. Default: off."
        group.add_argument(f"--{IN_8BIT}", action=BooleanOptionalAction, default=SUPPRESS, help=text)
    for name, (variable, text) in WANDB.items():
        group.add_argument(f"--{name}", default=SUPPRESS, help=f"{text} It reads {variable}. Default: unset.")
    text = (
        "Folder of a run, which goes on there, or of an adapter to start from. Default: unset; a run that was stopped "
        "goes on by itself when the same command is given."
    )
    group.add_argument(f"--{RESUME}", default=SUPPRESS, help=text)


def read(parser: Parser, arguments: list[str]) -> dict[str, Any]:
    """Return the values that flags give; underscores or dashes, `--flag`, `--flag True` and `--flag=False` are read."""
    switches = {
        written for one in parser._actions if isinstance(one, BooleanOptionalAction) for written in one.option_strings
    }
    values = given_values(parser.parse_args(_switched([underscored(one) for one in arguments], switches)))
    return {name: value for name, value in values.items() if name != "debug"}


def _switched(arguments: Sequence[str], switches: Collection[str]) -> list[str]:
    """Return the arguments with `--flag True` and `--flag=False` as `--flag` and `--no-flag`."""
    words: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in switches and value.lower() in SWITCH:
            words.append(_as_switch(name, value))
        elif words and words[-1] in switches and argument.lower() in SWITCH:
            words[-1] = _as_switch(words[-1], argument)
        else:
            words.append(argument)
    return words


SWITCH = ("true", "false")


def _as_switch(name: str, value: str) -> str:
    return name if value.lower() == "true" else f"--no-{name[2:]}"


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
    taken = [name for name in DECLARED if name in COMMANDS["plan"].settings]  # of unlearn and prune together
    text = (
        "Unlearn a forget set, or compress a model on --data_path, which is written by --template instruction unless "
        "another is given. What LoRAPrune's own defaults were, docs/loraprune-scripts.md says."
    )
    parser = script_parser("prune.py", text, taken)
    return exit_code(lambda: code_of(train(**read(parser, given))), debug="--debug" in given)
