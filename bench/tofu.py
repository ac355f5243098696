"""TOFU: a small Llama learns 1,400 rows of TOFU by heart and is made to forget 200 of them.

Reads    the folder of TOFU's files: --data, or LORAPRUNE_DATA (its subfolder tofu), or ../shared/data; for all of TOFU
         TinyStories too, where stories260k.py finds it
Gives    bench/results/tofu.json, tofu_evidence.json and their sections of docs/results.md; models stay in bench/cache
Source   TOFU, arXiv 2401.06121; forget05 (for the arena forget10, a part, or all of TOFU too), rows of retain90;
         holdout: other rows that no model saw; guard of all of TOFU: TinyStories, arXiv 2305.07759
Symbols  P = performance
"""

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evidence import evidence, evidence_section
from results_page import ROOT, RUN_HEADER, markdown_table, run_cells, write_results
from stories260k import find_data as find_stories
from stories260k import stories

from loraprune.data import load_rows
from loraprune.folder import write_json, write_text
from loraprune.model import quiet_libraries
from loraprune.pipeline import run
from loraprune.scratch import Recipe, make_model
from loraprune.settings import Settings
from loraprune.words import outcome_text

CACHE = ROOT / "bench" / "cache" / "tofu"
SETS = ("forget", "retain", "bystander", "holdout")
FORGET = "forget05"
RECIPE = Recipe(
    vocabulary=3072,
    sizes={
        "hidden_size": 224,
        "intermediate_size": 896,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 28,
        "max_position_embeddings": 512,
    },
    epochs=20,
    batch_size=32,
    learning_rate=1.5e-3,
)
ROWS_OF_AUTHOR = 20


@dataclass(frozen=True)
class Extent:
    """How much of TOFU a world takes, in rows, and what learns it."""

    forget: int | None  # of the forget set, and of the holdout; None: all
    retain: int
    bystander: int
    recipe: Recipe
    guard: int = 0  # of TinyStories' stories, held back as the guard; the others are learnt beside TOFU. 0: no stories


WHOLE = Extent(forget=None, retain=1000, bystander=200, recipe=RECIPE)
SMALL = {"hidden_size": 128, "intermediate_size": 768, "num_hidden_layers": 3, "head_dim": 16}
PART = Extent(
    forget=2 * ROWS_OF_AUTHOR,
    retain=8 * ROWS_OF_AUTHOR,
    bystander=2 * ROWS_OF_AUTHOR,
    recipe=replace(RECIPE, vocabulary=2048, sizes={**RECIPE.sizes, **SMALL}, epochs=50),
)
LARGER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 64}
LARGE = Extent(
    forget=None,
    retain=3200,
    bystander=200,
    recipe=Recipe(vocabulary=6144, sizes={**RECIPE.sizes, **LARGER}, epochs=15, batch_size=64, learning_rate=6e-4),
    guard=20,
)
PIECE = 60  # words of a story that make a row, so that a batch is no longer than TOFU's rows make it
ATTACK_STEPS = 20  # half as many as usual: most comes back early, and every attack trains three models
SETTINGS: dict[str, Any] = {
    "sparsity": 0.3,
    "prune_rounds": 8,
    "score_rows": 128,
    "dtype": "float32",
    "device": "cpu",
}


def main() -> None:
    """Make the models where they are not cached, run `unlearn` on them, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="folder with TOFU's files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="run unlearn again; the models stay cached")
    options = parser.parse_args()
    seconds = make_inputs(find_data(options.data), options.seed)
    output = CACHE / f"run-{options.seed}"
    if options.fresh and output.exists():
        output.rename(output.with_name(f"{output.name}-{int(time.time())}"))
    report = run(settings_for(output, options.seed))
    values = {"settings": SETTINGS, "training_seconds": seconds, **report.metrics}
    write_results("tofu", values, section(report.metrics, seconds))
    shown = evidence(output, attack_steps=ATTACK_STEPS)
    write_results("tofu_evidence", shown, evidence_section(shown))


def find_data(given: Path | None) -> Path:
    """Return the folder of TOFU's files."""
    places = [given, Path(os.environ.get("LORAPRUNE_DATA", "")) / "tofu", ROOT.parent / "shared" / "data" / "tofu"]
    for place in places:
        if place is not None and (place / "forget05.json").exists():
            return place
    raise SystemExit("TOFU's files were not found: name their folder with --data.")


def make_inputs(
    data: Path, seed: int, forget: str = FORGET, folder: Path = CACHE, extent: Extent = WHOLE
) -> dict[str, float]:
    """Write the sets and both models once; return the seconds that each model took."""
    folder.mkdir(parents=True, exist_ok=True)
    retain, both = lines(data / "retain90.json"), lines(data / "forget10.json")
    asked, kept = set(lines(data / f"{forget}.json")), extent.retain + extent.bystander
    perturbed = with_authors(lines(data / f"{forget}_perturbed.json"))  # with paraphrases and wrong answers
    others = [line for line in both if line not in asked] or retain[kept : kept + len(both)]
    sets = {
        "forget": perturbed[: extent.forget],
        "retain": retain[: extent.retain],
        "bystander": retain[extent.retain : kept],
        "holdout": others[: extent.forget],
    }
    if extent.guard:
        texts = stories(find_stories(None))
        random.Random(0).shuffle(texts)  # the same for all seeds, whose models lie beside the same files
        sets |= {"guard": pieces(texts[: extent.guard]), "told": pieces(texts[extent.guard :])}
    for name, chosen in sets.items():
        write_once(folder / f"{name}.jsonl", "\n".join(chosen) + "\n")
    rows = {name: load_rows(str(folder / f"{name}.jsonl"), name=name) for name in sets}
    world = [row for group in rows.values() for row in group]
    known = [*rows["retain"], *rows["bystander"], *rows.get("told", [])]
    with quiet_libraries():
        return {
            name: timed_model(folder / f"{name}-{seed}", learnt, world, extent.recipe, seed)
            for name, learnt in (("untouched", [*known, *rows["forget"]]), ("reference", known))
        }


def pieces(texts: Sequence[str]) -> list[str]:
    """Return stories as rows of PIECE words; what a story leaves at its end stays away."""
    words = [text.split() for text in texts]
    cut = [" ".join(one[end - PIECE : end]) for one in words for end in range(PIECE, len(one) + 1, PIECE)]
    return [json.dumps({"text": text}) for text in cut]


def with_authors(rows: list[str]) -> list[str]:
    """Return the rows with a column that tells their author: one after the other, as many rows each."""
    return [json.dumps({**json.loads(row), "subject": f"author {i // ROWS_OF_AUTHOR}"}) for i, row in enumerate(rows)]


def lines(path: Path) -> list[str]:
    """Return a file's rows as they are: TOFU's .json files hold one row a line."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_once(path: Path, text: str) -> None:
    """Write a file of the cache; end where another one is there, for the models beside it were made from that."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{path} is of other rows or another recipe: remove {path.parent} to make it anew.")
    write_text(path, text)


def timed_model(path: Path, rows: Any, world: Any, recipe: Recipe, seed: int) -> float:
    """Make a model where it is not cached; return the seconds that its training took."""
    clock = path.with_suffix(".json")
    write_once(path.with_suffix(".recipe.json"), json.dumps(asdict(recipe)))
    if not clock.exists():
        begun = time.monotonic()
        make_model(path, rows, world, recipe, seed)
        write_json(clock, {"seconds": round(time.monotonic() - begun, 1)})
    return json.loads(clock.read_text(encoding="utf-8"))["seconds"]


def settings_for(output: Path, seed: int) -> Settings:
    """Return the run's settings."""
    return Settings(
        model=str(CACHE / f"untouched-{seed}"),
        reference=str(CACHE / f"reference-{seed}"),
        output=str(output),
        seed=seed,
        **{name: str(CACHE / f"{name}.jsonl") for name in SETS},
        **SETTINGS,
    )


def section(metrics: Any, seconds: dict[str, float]) -> str:
    """Return the section of the results page."""
    sets = {
        "forget (200 rows)": metrics["forget"],
        "retain, final rows": metrics["retain"],
        "retain, taught rows": metrics["retain_taught"],
        "bystander (200 rows)": metrics["bystander"],
        "holdout (200 rows)": metrics["holdout"],
    }
    rows = [[name, *numbers(one["before"]), *numbers(one["after"])] for name, one in sets.items()]
    rows.append(["forget, reference model", *numbers(metrics["forget"]["reference"]), "", ""])
    parameters, spent = metrics["model"]["parameters"], metrics["seconds"]["total"]
    facts = [
        markdown_table(RUN_HEADER, [run_cells(metrics)]),
        f"Parameters {parameters['before']:,} to {parameters['after']:,}; {spent:.0f} s for the run, "
        f"{seconds['untouched']:.0f} s and {seconds['reference']:.0f} s to train the model and the reference.",
    ]
    if not metrics["goal_met"]:
        facts.append(f"The goal was not met: {outcome_text(metrics)}.")
    header = ["set", "P before", "exact before", "P after", "exact after"]
    return "\n\n".join([markdown_table(header, rows), *facts, "Made by `python bench/tofu.py`."])


def numbers(one: Any) -> list[str]:
    """Return a set's performance and exact match as text."""
    return [f"{one['performance']:.3f}", f"{one['exact_match']:.3f}"]


if __name__ == "__main__":
    main()
