"""Demo: a whole run on a world of the program's own, from invented people to a smaller model that forgot six of them.

Reads    a seed
Gives    a run folder that also holds the data files, the untouched model and the reference
Source   -
Symbols  -
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loraprune.attack import attack_run
from loraprune.attack_findings import show_findings
from loraprune.data import load_rows
from loraprune.errors import UserError
from loraprune.evidence import evidence_table, measure_models
from loraprune.folder import RunFolder, write_text
from loraprune.model import quiet_libraries
from loraprune.pipeline import run
from loraprune.records import RunReport
from loraprune.scratch import Recipe, make_model
from loraprune.settings import Settings
from loraprune.world import make_world

RECIPE = Recipe(
    vocabulary=640,
    sizes={
        "hidden_size": 128,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 128,
    },
    epochs=24,
)
SETTINGS: dict[str, Any] = {"sparsity": 0.26, "dtype": "float32", "device": "cpu"}


def run_demo(folder: Path, seed: int, show_examples: bool = True, console: Console | None = None) -> RunReport:
    """Make the world and both models (once), then run `unlearn` on them as a user would, and return its report."""
    console, settings = console or Console(), settings_for(folder, seed, show_examples=show_examples)
    with quiet_libraries(), RunFolder(folder, settings).held(console.print):
        make_inputs(folder, seed)
    return run(settings, console)


def show_evidence(folder: Path, console: Console) -> None:
    """Measure the run's three models by the metrics of the field, attack them, and print what came of it.

    Both are kept in `folder`, so that a call that was stopped goes on.
    """
    console.print("the original, the reference and the unlearned model by the metrics of the field:")
    measured = measure_models(folder, str(folder / "evaluations"))
    console.print(evidence_table(measured))
    console.print("and what attacks bring back (some minutes; what is above is finished, Ctrl-C leaves it as it is):")
    show_findings(attack_run(folder, {}), console)


def settings_for(folder: Path, seed: int, **others: Any) -> Settings:
    """Return the settings of the demo's run; `others` come on top."""
    values = {
        "model": str(folder / "untouched"),
        "reference": str(folder / "reference"),
        "output": str(folder),
        "seed": seed,
        **{name: str(folder / f"{name}.jsonl") for name in ("forget", "retain", "bystander", "holdout")},
    }
    return Settings(**{**values, **SETTINGS, **others})


def make_inputs(folder: Path, seed: int, recipe: Recipe = RECIPE) -> None:
    """Write the four data files, the untouched model and the reference, whichever are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = make_world(seed)
    for name, made in groups.items():
        write_rows(folder / f"{name}.jsonl", made)
    rows = {name: load_rows(str(folder / f"{name}.jsonl"), name=name) for name in groups}
    world = [row for group in rows.values() for row in group]
    known = [*rows["retain"], *rows["bystander"]]
    make_model(folder / "untouched", [*known, *rows["forget"]], world, recipe, seed)
    make_model(folder / "reference", known, world, recipe, seed)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a set's rows; refuse a folder that holds other ones."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{path} holds the world of another seed.",
            "models and data of two worlds would be mixed.",
            "choose another --output, or remove that folder.",
        )
    write_text(path, text)
