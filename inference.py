"""Inference: perplexity of plain texts, and the plan's evaluation of forget and retain set, before and after.

Reads    --base_model and --lora_weights (a run's adapter, with its mask) or a checkpoint; --text for LoRAPrune's
         perplexity; --forget_dataset, --retain_dataset, --original_model and the settings of `loraprune evaluate`
Gives    perplexity and time; tables on stdout and the plan's three metrics
Source   LoRAPrune's inference.py; the unlearning plan, section 6
Symbols  P = performance, in [0, 1]
"""

import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loraprune.cli import COMMANDS, GOAL_MET, add_setting, exit_code
from loraprune.errors import UserError
from loraprune.scripts import PLAN_NAMES, read, script_parser, settings_of
from loraprune.settings import DECLARED

if TYPE_CHECKING:
    from loraprune.cli import Parser
    from loraprune.evaluation import Evaluation
    from loraprune.records import Interval
    from loraprune.settings import Settings


def evaluate(original_model: str = "", lora_weights: str = "", text: Sequence[str] = (), **values: Any) -> int:
    """Print what is asked for of the model, with its adapter and mask where these are given; return the exit code."""
    with TemporaryDirectory() as scratch:
        asked = {PLAN_NAMES[name][0] if name in PLAN_NAMES else name: one for name, one in values.items()}
        made_with = {name: asked[name] for name in OF_ADAPTER if name in asked}
        values = {name: one for name, one in values.items() if name not in OF_ADAPTER and name not in SPELT}
        if lora_weights:
            values = assembled(values, lora_weights, made_with, Path(scratch) / "model")
        elif made_with:
            raise _idle(next(iter(made_with)), "--lora_weights")
        with_sets = "forget" in asked or "retain" in asked
        texts = [*text, *([values["guard"]] if "guard" in values and not with_sets else [])]
        if texts:
            measure_texts(values, texts)
        if with_sets or not texts:
            return evaluate_sets(original_model, values)
        if original_model:
            raise _idle("original_model", "--forget_dataset and --retain_dataset")
    return GOAL_MET


OF_ADAPTER = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")
SPELT = ("lora_r", "lora_target_modules")


def _idle(name: str, other: str) -> UserError:
    return UserError(f"--{name} is given without {other}.", "it would be ignored.", f"add {other}, or leave it out.")


def assembled(values: Mapping[str, Any], weights: str, made_with: Mapping[str, Any], folder: "Path") -> dict[str, Any]:
    """Return the values with the pruned model of base, adapter and mask as the model, written to `folder`."""
    settings = needing(values, ("model",))
    from loraprune.assembled import assemble
    from loraprune.model import quiet_libraries

    with quiet_libraries():
        made = assemble(settings, weights, made_with, folder)
    share = made.removed / made.parameters
    print(f"adapter {made.adapter}, cut: {made.removed:,} of {made.parameters:,} parameters removed ({share:.2%})")
    return {name: one for name, one in values.items() if name != "base_model"} | {"model": str(folder)}


def measure_texts(values: Mapping[str, Any], sources: Sequence[str]) -> None:
    """Print each text's perplexity at the context length of the settings."""
    settings = needing(values, ("model",))
    from loraprune.model import check_machine, checked_config, load_model, load_tokenizer, quiet_libraries
    from loraprune.windows import measure_text

    check_machine(settings)
    with quiet_libraries():
        checked_config(settings.model, settings)
        model, tokenizer = load_model(settings.model, settings), load_tokenizer(settings.model, settings)
        for source in sources:
            print(measure_text(source, model, tokenizer, settings).line())


def needing(values: Mapping[str, Any], needed: tuple[str, ...]) -> "Settings":
    """Return the checked settings of the values where no more than `needed` must be given."""
    return settings_of(values, "evaluate", needed)


def evaluate_sets(original_model: str, values: Mapping[str, Any]) -> int:
    """Print each set's numbers, and what changed since the original model where there is one; return the exit code."""
    after = measured(values)
    show("the model", after)
    if original_model:
        before = measured({**values, "base_model": "", "model": original_model})
        show("the original model", before)
        print("\n".join(changes(performances(before), performances(after))))
    return GOAL_MET


def measured(values: Mapping[str, Any]) -> "Evaluation":
    """Return the evaluation of the model on the sets that the values name, as `loraprune evaluate` makes it."""
    settings = settings_of(values, "evaluate")
    from loraprune.evaluation import evaluate as evaluate_settings

    return evaluate_settings(settings)


def show(title: str, evaluation: "Evaluation") -> None:
    """Print one model's numbers as a table under its title."""
    from rich.console import Console

    from loraprune.evaluation_table import show_evaluation

    console = Console()
    console.print(f"\n{title}")
    show_evaluation(evaluation.values, console)


Rows = Mapping[str, tuple[Sequence[float], Sequence[int]]]  # of each set: P of every row, and its fact


def performances(evaluation: "Evaluation") -> Rows:
    """Return P of every row of every set, and its fact."""
    return {name: (one.teacher_forced["probability"], one.encoded.facts) for name, one in evaluation.scored.items()}


def changes(before: Rows, after: Rows) -> list[str]:
    """Return the plan's metrics as lines: the drop on forget, the retention on retain, and their quotient."""
    from loraprune.interval import mean_interval, ratio_interval
    from loraprune.metrics import forget_drop, retention, unlearning_efficiency

    (known, facts), (left, _) = before["forget"], after["forget"]
    (had, kept_facts), (has, _) = before["retain"], after["retain"]
    drop, kept = forget_drop(mean(known), mean(left)), retention(mean(had), mean(has))
    drops = [forget_drop(*pair) for pair in zip(known, left, strict=True)]
    per_retain = unlearning_efficiency(drop, kept, None, None)["forget_per_retain"]
    of_drop, of_kept = said(mean_interval(drops, facts)), said(ratio_interval(has, had, kept_facts))
    return [
        f"performance drop on forget  {drop:8.4f}   {of_drop}P before - P after, {size(facts)}",
        f"retention on retain         {kept:8.4f}   {of_kept}P after / P before, {size(kept_facts)}",
        f"unlearning efficiency       {per_retain:8.4f}   drop / max(1 - retention, 0.01)",
        "Rows of the retain set that were trained on show less of a loss than rows that nothing was trained on.",
    ]


def size(facts: Sequence[int]) -> str:
    """Return on what a number stands: the rows given, and how many facts they are."""
    rows, different = len(facts), len(set(facts))
    return f"on the rows given: {rows:,} ({different:,} {'fact' if different == 1 else 'facts'})"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def said(interval: "Interval | None") -> str:
    """Return a 95% interval as words in front of others; nothing where there is none."""
    return "" if interval is None else f"({interval[0]:.4f} to {interval[1]:.4f})  "


def main(arguments: list[str] | None = None) -> int:
    """Run the script and return its exit code; None takes the process's own arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_code(lambda: _call(given), debug="--debug" in given)


def _call(arguments: list[str]) -> int:
    text = "Measure a model on the forget set and the retain set."
    parser = script_parser("inference.py", text, COMMANDS["evaluate"].settings)
    parser.add_argument("--original_model", default="", help="The model before unlearning; adds what changed.")
    add_adapter_flags(parser)
    return evaluate(**read(parser, arguments))


def add_adapter_flags(parser: "Parser") -> None:
    """Add the flags of LoRAPrune's script that are no settings of an evaluation."""
    group = parser.add_argument_group("a run's adapter, and plain text")
    weights = "A run's folder, or its adapter folder; base model, adapter and mask beside it are put together and cut."
    group.add_argument("--lora_weights", default="", metavar="DIR", help=f"{weights} Default: unset.")
    text = (
        "Plain text for perplexity in windows of --cutoff_len tokens: a file, or a hub name name:config:split; may be "
        "repeated. --guard without the two sets is read like it; with these sets every metric is measured on them."
    )
    options: dict[str, Any] = {"default": SUPPRESS, "action": "append", "type": lambda one: (one,)}
    group.add_argument("--text", metavar="FILE", help=f"{text} Default: unset.", **options)
    written = {"lora_rank": "lora_r", "target_modules": "lora_target_modules"}
    for name in OF_ADAPTER:
        sentence = f"{DECLARED[name].text} The adapter must have been made with it. Unset: whatever the adapter has."
        add_setting(group, name, f"--{written.get(name, name)}", text=sentence, show_default=False)


if __name__ == "__main__":
    raise SystemExit(main())
