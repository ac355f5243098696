"""Command line: parses and calls, nothing else; `--help` and errors load neither torch nor transformers.

Reads    arguments, and a TOML file of settings where --config names one
Gives    main, settings_of; what prune.py and inference.py share with it: Parser, add_setting, complete, exit_code ...
Source   -
Symbols  -
"""

import argparse
import itertools
import json
import logging
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from loraprune import evaluate_command
from loraprune.errors import UserError, nearest
from loraprune.launch import here, refuse_several
from loraprune.records import RunReport
from loraprune.setting import Setting, flag, value_text
from loraprune.settings import DECLARED, Settings
from loraprune.settings_file import read_settings, settings_from

GOAL_MET, BUG, USER_ERROR, GOAL_MISSED, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = "exit codes: 0 the goal is met, 3 the run ended before it, 2 an error you can mend, 1 a bug"

WORDS = {"model": "MODEL", "output": "DIR"}  # settings that are written without a flag
METAVARS: dict[type, str | None] = {str: None, int: "N", float: "X", tuple: "A,B,...", dict: "ROLE=COLUMN"}

UNLEARNING_ONLY = (
    *("forget", "retain", "holdout", "bystander", "reference", "original", "already_forgotten", "request_id"),
    *("allow_overlap", "forget_batch_size", "unlearning_threshold", "unlearning_epsilon"),
    *("minimum_forget_sensitivity", "order", "retain_cost", "max_sparsity", "forget_target", "natural_spread", "band"),
    *("forget_loss", "forget_retain_ratio", "forget_loss_beta", "relearning_radius", "show_examples"),
)
COMPRESSION_ONLY = (
    *("data", "preset", "score_from", "score_every", "score_norm"),
    *("budget", "attention_ratio", "sparsity_of", "schedule"),
)
EVALUATION_ONLY = ("cache", "compat", "rouge_rows", "gradient_norm")
EVALUATION = (
    *("model", "reference", "dtype", "device", "trust_remote_code"),
    *("forget", "retain", "holdout", "bystander", "guard", "columns", "template", "max_length", "evaluate_batch_size"),
    *EVALUATION_ONLY,
    "seed",
)
ATTACK_ONLY = ("attacks", "attack_steps", "attack_learning_rate", "attack_samples", "attack_rows", "attack_sparsity")
ATTACK = (
    *("model", "output", "reference", "dtype", "device", "trust_remote_code", "forget", "retain"),
    *("floor_rows", "final_rows", "columns", "max_length"),
    *("forget_batch_size", "retain_batch_size", "evaluate_batch_size"),
    *ATTACK_ONLY,
    "seed",
)


Arguments = Mapping[str, Mapping[str, Any]]  # what argparse is told of each
JSON: Arguments = {"--json": {"action": "store_true", "help": "Print JSON, and nothing else, on stdout."}}
CONFIG: Arguments = {
    "--config": {"metavar": "FILE.toml", "default": argparse.SUPPRESS, "help": "Settings; flags override."}
}


@dataclass(frozen=True)
class Command:
    """One command: what it does, the settings it takes, those it cannot do without, and what it calls."""

    text: str
    settings: tuple[str, ...]
    required: tuple[str, ...]
    call: Callable[[Settings, Namespace], int]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where they differ from those of Settings
    takes_any_file: bool = False  # a settings file may hold settings that steer nothing here
    first_word: str = "model"  # the setting that is written without a flag
    others: Arguments = field(default_factory=dict)  # arguments that are no settings
    needs_with: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # what `required` shrinks to with an argument
    only_looks: bool = False  # at the run of unlearn or of prune that the values ask for; it takes that one's settings

    @property
    def flagged(self) -> tuple[str, ...]:
        return tuple(name for name in self.settings if name != self.first_word)


def _all_but(*names: str) -> tuple[str, ...]:
    return tuple(name for name in DECLARED if name not in names)


def _run(settings: Settings, options: Namespace) -> int:
    from loraprune.pipeline import run

    return code_of(run(settings))


def _evaluate(settings: Settings, options: Namespace) -> int:
    given = [_spelt("evaluate", name) for name in EVALUATION if name in options]
    evaluate_command.evaluate(settings, options, given)
    return GOAL_MET


def _attack(settings: Settings, options: Namespace) -> int:
    from loraprune.attack import attack_run
    from loraprune.attack_findings import show_findings

    given = {name: value for name, value in given_values(options).items() if name in ATTACK}
    return _show(attack_run(Path(settings.output), given), options, show_findings)


def _status(settings: Settings, options: Namespace) -> int:
    from loraprune.status import read_status, status_text

    status = read_status(Path(settings.output))
    print(json.dumps(asdict(status), indent=2) if options.json else status_text(status, settings.output))
    return GOAL_MET


def _plan(settings: Settings, options: Namespace) -> int:
    from loraprune.plan import make_plan
    from loraprune.plan_tables import show_plan

    return _show(make_plan(settings), options, show_plan)


def _show(values: Mapping[str, Any], options: Namespace, show: Callable[..., None]) -> int:
    """Print what a command found, as JSON or by `show`."""
    if options.json:
        print(json.dumps(values, indent=2))
        return GOAL_MET
    from rich.console import Console

    show(values, Console())
    return GOAL_MET


def _demo(settings: Settings, options: Namespace) -> int:
    from rich.console import Console

    from loraprune.demo import run_demo, show_evidence

    folder = Path(settings.output or ("runs/demo" if settings.seed == 0 else f"runs/demo-{settings.seed}"))
    code = code_of(run_demo(folder, settings.seed, settings.show_examples))
    show_evidence(folder, Console())
    return code


COMMANDS: dict[str, Command] = {
    "unlearn": Command(
        "Cut out what serves the forget set and not the retain set.",
        _all_but(*COMPRESSION_ONLY, *EVALUATION_ONLY, *ATTACK_ONLY),
        ("model", "forget", "retain", "output"),
        _run,
        others=CONFIG,
    ),
    "prune": Command(
        "Compress a model to a sparsity; no forget set. There is no floor unless one is set.",
        _all_but(*UNLEARNING_ONLY, *EVALUATION_ONLY, *ATTACK_ONLY),
        ("model", "data", "sparsity", "output"),
        _run,
        {"min_retain_performance": 0.0},
        others=CONFIG,
    ),
    "evaluate": Command(
        "Measure what a model knows of each set, by every metric of the field.",
        EVALUATION,
        ("model", "forget", "retain"),
        _evaluate,
        takes_any_file=True,
        others={**JSON, **CONFIG, **evaluate_command.OPTIONS},
        needs_with=evaluate_command.NEEDS,
    ),
    "attack": Command(
        "Try to bring back what a run made its model forget, and show what came back. Models, data and whatever else "
        "is not given here are those of the run.",
        ATTACK,
        ("output",),
        _attack,
        first_word="output",
        others=JSON,
    ),
    "status": Command(
        "Show how far a run is, or how it ended, from what it wrote so far.",
        ("output",),
        ("output",),
        _status,
        first_word="output",
        others=JSON,
    ),
    "plan": Command(
        "Look before you leap: every check of a run, candidates, memory and time; changes nothing. The flags are those "
        "of unlearn, or of prune where --data is given; --output may be left out.",
        _all_but(*EVALUATION_ONLY, *ATTACK_ONLY),
        ("model", "forget", "retain"),
        _plan,
        others={**JSON, **CONFIG},
        only_looks=True,
    ),
    "demo": Command(
        "Train a tiny model, make it forget a part of what it learnt, attack it, and show the result; no download.",
        ("output", "seed", "show_examples"),
        (),
        _demo,
        {"show_examples": True},
    ),
}


SHARED = ("unlearn", "prune")  # several processes of one launch work on one run


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code; None takes the process's own arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code(partial(_call, given), debug="--debug" in given)


def settings_of(arguments: list[str]) -> Settings:
    """Return the checked settings that a command line asks for, without running it."""
    return _settings(_parse(arguments))


def exit_code(action: Callable[[], int], *, debug: bool) -> int:
    """Return the action's exit code, or that of how it failed, having said so on stderr."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it misses a kernel nobody needs
    try:
        return action()
    except UserError as error:
        if debug:
            traceback.print_exc()
        if here().first:
            print(error, file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if here().first:
            print("interrupted; the same command resumes the run.", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return BUG


def code_of(report: RunReport) -> int:
    """Return the exit code of a run that came to its end."""
    return GOAL_MET if report.goal_met else GOAL_MISSED


def _call(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.command not in SHARED:
        refuse_several(options.command)
    return COMMANDS[options.command].call(_settings(options), options)


def _parse(arguments: list[str]) -> Namespace:
    word = next((one for one in arguments if not one.startswith("-")), None)
    if word is not None and word not in COMMANDS:
        raise _no_command(f"there is no command {word}.", nearest(word, COMMANDS))
    options = _parser().parse_args(arguments)
    if options.command is None:
        raise _no_command("no command was given.", None)
    return options


def _no_command(what: str, close: str | None) -> UserError:
    listed = ", ".join(COMMANDS)
    fix = f"did you mean loraprune {close}?" if close else "loraprune --help says what each command does."
    return UserError(what, f"the first word names the command: {listed}.", fix)


def _settings(options: Namespace) -> Settings:
    file = read_settings(Path(options.config)) if "config" in options else {}
    settings_from(file)  # its errors, before a flag hides them
    taken = COMMANDS[options.command].settings
    flags = {name: value for name, value in given_values(options).items() if name in taken}
    needs = COMMANDS[options.command].needs_with.items()
    needed = next((names for argument, names in needs if getattr(options, argument) is not None), None)
    return complete(options.command, {**file, **flags}, needed=needed)


def complete(
    command: str,
    values: Mapping[str, Any],
    spell: Callable[[str], str] | None = None,
    needed: tuple[str, ...] | None = None,
) -> Settings:
    """Return a command's checked settings: its defaults, overridden by `values`.

    Raises UserError for a setting that is missing, foreign to the command or out of range; `spell` gives the flag
    by which a missing one is named; `needed` are the settings that must be given, None the command's own.
    """
    run = _looked_at(values) if COMMANDS[command].only_looks else command
    settings = settings_from({**COMMANDS[run].defaults, **values})
    _refuse_foreign(run, settings)
    required = _required(command, run) if needed is None else needed
    _refuse_missing(settings, required, spell or partial(_spelt, run))
    return settings


def _looked_at(values: Mapping[str, Any]) -> str:
    """Return the command whose run the values ask for: unlearn where a forget or a retain set is given, else prune."""
    return "unlearn" if values.get("forget") or values.get("retain") or not values.get("data") else "prune"


def _required(command: str, run: str) -> tuple[str, ...]:
    """Return what must be given: all that the run needs, without the folder of a run that is only looked at."""
    required = COMMANDS[run].required
    return required if command == run else tuple(name for name in required if name != "output")


def _refuse_foreign(command: str, settings: Settings) -> None:
    if COMMANDS[command].takes_any_file:
        return
    for name in settings.changed(Settings()):
        if name not in COMMANDS[command].settings:
            raise _foreign(f"loraprune {command}", name, name)


def _refuse_missing(settings: Settings, required: tuple[str, ...], spell: Callable[[str], str]) -> None:
    missing = [spell(name) for name in required if getattr(settings, name) in (None, "")]
    if missing:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.",
            f"the command needs {', '.join(map(spell, required))}.",
            f"add {' '.join(missing)}; --help says what each takes.",
        )


def _foreign(program: str, name: str, written: str) -> UserError:
    takers = [command for command, one in COMMANDS.items() if name in one.settings and not one.only_looks]
    return UserError(
        f"{program} takes no {written}.",
        f"it is a setting of loraprune {', '.join(takers)}, and would be ignored here.",
        f"leave {written} out, or run loraprune {takers[0]}.",
    )


def _spelt(command: str, name: str) -> str:
    """Return how a command's setting is written: its flag, or the word that stands without one."""
    return WORDS[name] if name == COMMANDS[command].first_word else flag(name)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and raises UserError for whatever it cannot read."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore  # base: overloads
        options, rest = super().parse_known_args(args, namespace)
        if rest:
            raise self._not_known(rest)
        return options, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{message.removeprefix('argument ')}.",
            "the command line cannot be read as it stands.",
            f"{self.prog} --help shows how each flag is written.",
        )

    def _not_known(self, rest: list[str]) -> UserError:
        written = next((one.partition("=")[0] for one in rest if one.startswith("-")), None)
        if written is None:
            return UserError(f"no flag takes {rest[0]!r}.", f"{self.prog} does not expect it.", "name its flag.")
        name = written.lstrip("-").replace("-", "_")
        words = {one.dest: one.metavar for one in self._actions if not one.option_strings}
        if name in words:
            return UserError(
                f"there is no flag {written}.",
                f"{self.prog} takes it without a flag, as {words[name]}.",
                f"leave {written} out; what follows it stays.",
            )
        if name in DECLARED:
            return _foreign(self.prog, name, written)
        known = {one.lstrip("-").replace("-", "_"): one for one in self._option_string_actions}
        close = nearest(name, known)
        return UserError(
            f"there is no flag {written}.",
            "a misspelt flag would be ignored, and the run would not be the one you asked for.",
            f"did you mean {known[close]}?" if close else f"{self.prog} --help lists all flags.",
        )


def _parser() -> Parser:
    parser = Parser(prog="loraprune", description="Make a language model forget.", epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"loraprune {version('loraprune')}")
    add_debug(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        _fill(commands.add_parser(name, help=command.text, usage=_usage(name), description=command.text), name)
    return parser


def _usage(name: str) -> str:
    command = COMMANDS[name]
    first = [WORDS[one] for one in command.required if one == command.first_word]
    flags = [f"{flag(one)} {one.upper()}" for one in command.required if one in command.flagged]
    return " ".join(["loraprune", name, *first, *flags, "[settings]" if command.flagged else "[options]"])


def _fill(parser: Parser, name: str) -> None:
    command = COMMANDS[name]
    if (first := command.first_word) in command.settings:
        parser.add_argument(
            first, metavar=WORDS[first], nargs="?", default=argparse.SUPPRESS, help=DECLARED[first].text
        )
    for written, options in command.others.items():
        parser.add_argument(written, **options)
    add_debug(parser)
    flagged = [DECLARED[one] for one in command.flagged]
    for section, settings in itertools.groupby(flagged, lambda one: one.section):
        group = parser.add_argument_group(section)
        for one in settings:
            add_setting(group, one.name, one.flag, default=command.defaults.get(one.name))


def add_debug(parser: Parser) -> None:
    """Add --debug, which exit_code's caller looks for."""
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="Show the traceback of errors.")


def add_setting(
    parser: Any, name: str, written: str, *, text: str = "", default: Any = None, show_default: bool = True
) -> None:
    """Add a setting's flag, written as given, to a parser or its group; all else changes its help only."""
    one = DECLARED[name]
    options: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": _help(one, text or one.text, default, show_default),
    }
    if one.kind is bool:
        parser.add_argument(written, action=argparse.BooleanOptionalAction, **options)
        return
    action = "append" if one.kind in (tuple, dict) else "store"
    words = one.allowed_words
    metavar = "{" + ",".join(words) + "}" if words else METAVARS[one.kind]
    parser.add_argument(written, action=action, type=partial(_read, one), metavar=metavar, **options)


def _help(one: Setting, text: str, default: Any, show_default: bool) -> str:
    default = one.default if default is None else default
    allowed = f" It must be {one.allowed_text}." if one.kind in (int, float) else ""
    said = f" Default: {value_text(default)}." if show_default else ""
    return f"{text}{said}{allowed}".replace("%", "%%")


def _read(one: Setting, text: str) -> Any:
    """Return what a flag's text means for a setting; lists may stand in square brackets."""
    if one.kind is tuple:
        return tuple(part.strip() for part in text.strip("[] ").split(",") if part.strip())
    if one.kind is dict:
        return _read_pair(one, text)
    try:
        return one.kind(text)
    except ValueError:
        raise one.wrong(text) from None


def _read_pair(one: Setting, text: str) -> dict[str, str]:
    role, _, column = text.partition("=")
    if not role or not column:
        raise one.wrong(text)
    return {role: column}


def given_values(options: Namespace) -> dict[str, Any]:
    """Return what was given, by name; a list's flag that was repeated counts as one."""
    return {name: _joined(value) for name, value in vars(options).items()}


def _joined(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if isinstance(value[0], dict):
        return {role: column for pair in value for role, column in pair.items()}
    return tuple(itertools.chain.from_iterable(value))
