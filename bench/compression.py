"""Compression: which sensitivity loses least when stories260K is cut, by sparsity, before and after recovery?

Reads    stories260K and TinyStories by stories260k.py: --data, or LORAPRUNE_DATA, or ../shared/data
Gives    bench/results/compression.json, docs/compression.png and the section of docs/results.md; finished runs stay in
         bench/cache/compression under the hash of their settings and data, and are not run again: empty it when
         the code has changed
Source   LoRAPrune, arXiv 2305.18403, whose released code is one of the methods
Symbols  loss = mean over withheld stories of the mean negative log-likelihood per token, in nats
"""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from results_page import ROOT, markdown_table, write_results
from rich.console import Console
from stories260k import check, find_data, make_folder, stories

from loraprune.errors import UserError
from loraprune.folder import write_json
from loraprune.groups import meta_groups
from loraprune.model import checked_config, weights_hash
from loraprune.pipeline import run
from loraprune.rules import Rules, most_removable
from loraprune.settings import Settings, as_values
from loraprune.settings_file import settings_from

Values = dict[str, Any]
CACHE = ROOT / "bench" / "cache" / "compression"
FIGURE = ROOT / "docs" / "compression.png"
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
SEEDS = (0, 1, 2)
HARDLY = 0.005  # the control: the same training with one channel a layer cut, since training alone changes the loss
RELEASED, CONTROL = "released", "hardly pruned"
METHODS: dict[str, Values] = {
    "lora": {"metric": "lora"},
    "gate": {"metric": "gate"},
    "grad": {"metric": "grad"},
    "activation": {"metric": "activation"},
    "magnitude": {"metric": "magnitude"},
    "random": {"metric": "random"},
    RELEASED: {"preset": "released"},
    "gate, rescaled": {"metric": "gate", "rescale_survivors": True},
    "gate, q_heads": {"metric": "gate", "attention_unit": "q_head"},
}
WITHHELD, LOOKED_AT = 40, 4  # stories; the few rows of the floor, which holds nothing here
COMMON: Values = {  # of every method, presets included: the same data, steps, batches and adapters
    "sparsity_of": "parameters",
    "learning_rate": 4e-3,  # of 1, 2, 4, 8e-3 the best mean of four methods on another seed's stories
    "lora_dropout": 0.0,
    "min_retain_performance": 0.0,
    "max_guard_loss_ratio": 1e9,  # the guard is looked at and does not steer
    "max_length": 192,  # tokens of each story, from its beginning on
    "score_rows": 32,
    "retain_batch_size": 8,
    "evaluate_batch_size": 32,
    "warmup_steps": 10,
    "prune_every": 10,
    "prune_rounds": 6,
    "finish_steps": 50,
    "evaluate_every": 50,
    "dtype": "float32",
    "device": "cpu",
}


def main() -> None:
    """Run what has not been run yet, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="folder above tinyllama-260k and tinystories")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="one seed, 10%% and 50%%, printed, nothing written")
    options = parser.parse_args()
    data = find_data(options.data)
    model, seeds = make_folder(data), SEEDS[:1] if options.quick else SEEDS
    values: Values = {"model": check(model, data), "most_removable": most(model), "settings": COMMON}
    sparsities = (SPARSITIES[0], SPARSITIES[-1]) if options.quick else SPARSITIES
    values["runs"] = list(all_runs(model, stories(data), options.methods, sparsities, seeds))
    print(section(values))
    if not options.quick:
        draw(values["runs"], FIGURE)
        write_results("compression", values, section(values))


def most(model: Path) -> float:
    """Return which part of all parameters can go at most."""
    settings = Settings(model=str(model))
    groups = meta_groups(checked_config(settings.model, settings))
    return most_removable(groups, Rules.of(settings)) / groups.total_parameters


# --- runs -------------------------------------------------------------------------------------------------------------


def all_runs(
    model: Path, texts: Sequence[str], methods: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]
) -> Iterator[Values]:
    """Give the numbers of every run; the methods of a seed and a sparsity follow each other."""
    plans = [(sparsity, method, METHODS[method]) for sparsity in sparsities for method in methods]
    for seed in seeds:
        sets = write_sets(texts, seed)
        for sparsity, method, own in [(HARDLY, CONTROL, {}), *plans]:
            given = {**COMMON, **own, **sets, "model": str(model), "sparsity": sparsity, "seed": seed}
            yield {"method": method, "sparsity": sparsity, "seed": seed, **one_run(given)}


def write_sets(texts: Sequence[str], seed: int) -> dict[str, str]:
    """Write a seed's stories in three files: to train on, for the floor, withheld; return which set is which file."""
    order, folder = random.Random(seed).sample(list(texts), len(texts)), CACHE / f"stories-{seed}"
    parts = {
        "data": order[WITHHELD + LOOKED_AT :],
        "floor_rows": order[WITHHELD : WITHHELD + LOOKED_AT],
        "final_rows": order[:WITHHELD],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = "".join(json.dumps({"text": one}) + "\n" for one in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    names = {name: str(folder / f"{name}.jsonl") for name in parts}
    return {**names, "guard": names["final_rows"]}  # what is looked at after every pruning step


def one_run(given: Values) -> Values:
    """Return a run's numbers, kept under its hash; what the settings do not allow is said and not kept."""
    try:
        settings = settings_from(given)
        kept = CACHE / f"{run_key(settings)}.json"
        if not kept.exists():
            output = kept.with_suffix("")
            report = run(dataclasses.replace(settings, output=str(output)), Console(file=io.StringIO()))
            write_json(kept, numbers(report.metrics, output / "events.jsonl"))
            shutil.rmtree(output)
    except UserError as error:
        print(f"refused: {error.what}", flush=True)
        return {"refused": error.what}
    return json.loads(kept.read_text(encoding="utf-8"))


def run_key(settings: Settings) -> str:
    """Return a hash of all settings, defaults included, and of the content of what they name; not of the code."""
    said = {name: value for name, value in as_values(settings).items() if name != "output"}
    for name in ("data", "floor_rows", "final_rows", "guard"):
        said[name] = hashlib.sha256(Path(said[name]).read_bytes()).hexdigest()
    said["model"] = weights_hash(settings.model)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def numbers(metrics: Values, events: Path) -> Values:
    """Return what the table needs of a run: the loss before anything, after the last cut, and at the end."""
    lines = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    last = [one for one in lines if one["event"] == "accept"][-1]
    guard = metrics["guard"]
    return {
        "removed": metrics["sparsity"],
        "groups": metrics["model"]["groups"],
        "outcome": metrics["outcome"],
        "dense": guard["before"]["loss"],
        "cut": last["guard_loss_ratio"] * guard["before"]["loss"],
        "recovered": guard["after"]["loss"],
        "seconds": metrics["seconds"],
    }


# --- what is shown ----------------------------------------------------------------------------------------------------


def select(runs: Sequence[Values], method: str, sparsity: float) -> list[Values]:
    """Return a method's finished runs at one sparsity, one a seed."""
    return [one for one in runs if (one["method"], one["sparsity"]) == (method, sparsity) and "refused" not in one]


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation over the seeds."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def shown_of(runs: Sequence[Values]) -> tuple[list[str], list[float]]:
    """Return methods and sparsities of the runs, the control aside, in their order."""
    rest = [one for one in runs if one["method"] != CONTROL]
    return list(dict.fromkeys(one["method"] for one in rest)), sorted({one["sparsity"] for one in rest})


def section(values: Values) -> str:
    """Return the section of the results page."""
    runs, header = (
        values["runs"],
        ("asked", "method", "loss after the last cut", "after recovery", "removed", "seconds"),
    )
    methods, sparsities = shown_of(runs)
    rows = [row_of(runs, sparsity, method) for sparsity in sparsities for method in methods]
    control, steps = select(runs, CONTROL, HARDLY), values["settings"]
    training = steps["warmup_steps"] + steps["prune_every"] * steps["prune_rounds"]
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"The untouched model: {spread([one['dense'] for one in control])}. The same training with "
            f"{fmean(one['removed'] for one in control):.1%} removed, which tells what training alone does: "
            f"{spread([one['recovered'] for one in control])}. Mean ± standard deviation over "
            f"{len(control)} seed(s), each with its own {WITHHELD} withheld stories; loss: mean over these of the mean "
            "negative log-likelihood per token, in nats.",
            verdict(runs),
            f"stories260K, a trained Llama of 260,032 parameters with grouped-query attention; "
            f"{values['model']['loss']:.2f} nats a token on the first stories of TinyStories. At most "
            f"{values['most_removable']:.1%} of all parameters can go under uniform widths; embeddings and norms are "
            "13%. One attention slice is 5.9% of all parameters, so channels make up the exact share. Every method: "
            f"{training} steps of LoRA with cuts in between and {steps['finish_steps']} of recovery on the same "
            f"{steps['retain_batch_size']} stories a step, scores on {steps['score_rows']} stories; of every "
            f"story the first {steps['max_length']} tokens. The seconds are of "
            "a machine that other work shared. Made by `python bench/compression.py`.",
        ]
    )


def row_of(runs: Sequence[Values], sparsity: float, method: str) -> list[str]:
    """Return one line of the table; what was refused says so."""
    found = select(runs, method, sparsity)
    if not found:
        return [f"{sparsity:.0%}", method, "not run", "", "", ""]
    losses = [spread([one[name] for one in found]) for name in ("cut", "recovered")]
    removed, seconds = fmean(one["removed"] for one in found), fmean(one["seconds"]["total"] for one in found)
    return [f"{sparsity:.0%}", method, *losses, f"{removed:.1%}", f"{seconds:.0f}"]


def verdict(runs: Sequence[Values]) -> str:
    """Return whether the default is the best of them and beats the released code, or where not."""
    methods, sparsities = shown_of(runs)
    default = next(name for name, own in METHODS.items() if own.get("metric") == Settings().metric)
    means = {(method, sparsity): mean_after(runs, method, sparsity) for method in methods for sparsity in sparsities}
    lost: list[str] = []
    for sparsity in sparsities:
        mine = means.get((default, sparsity))
        rivals = {method: loss for method in methods if (loss := means[method, sparsity]) is not None}
        if mine is None or not rivals:
            continue
        best = min(rivals, key=lambda method: rivals[method])
        if best != default:
            lost.append(f"at {sparsity:.0%} {best} is better by {mine - rivals[best]:.3f}")
        if RELEASED in rivals and best != RELEASED and rivals[RELEASED] <= mine:
            lost.append(f"at {sparsity:.0%} {RELEASED} is better by {mine - rivals[RELEASED]:.3f}")
    missing = [name for name in METHODS if not any(means.get((name, sparsity)) for sparsity in sparsities)]
    aside = f" Not run: {', '.join(missing)}." if missing else ""
    if not lost:
        beaten = "" if RELEASED in missing else f", and beats {RELEASED} at every sparsity"
        return f"The default, {default}, has the lowest loss after recovery at every sparsity{beaten}.{aside}"
    return f"The default, {default}, is not the best everywhere: {'; '.join(lost)} nats after recovery.{aside}"


def mean_after(runs: Sequence[Values], method: str, sparsity: float) -> float | None:
    """Return the mean loss after recovery; None where nothing was run."""
    found = select(runs, method, sparsity)
    return fmean(one["recovered"] for one in found) if found else None


def draw(runs: Sequence[Values], path: Path) -> None:
    """Draw loss against the share removed: dashed after the last cut, solid after recovery."""
    methods, sparsities = shown_of(runs)
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    for number, method in enumerate(methods):
        found = {sparsity: one for sparsity in sparsities if (one := select(runs, method, sparsity))}
        if not found:
            continue
        across = [fmean(one["removed"] for one in ones) for ones in found.values()]
        for name, line in (("cut", "--"), ("recovered", "-")):
            up = [fmean(one[name] for one in ones) for ones in found.values()]
            label = method if name == "recovered" else None
            axes.plot(across, up, line, color=f"C{number}", label=label, marker="o", markersize=3)
    axes.axhline(fmean(one["dense"] for one in runs if "dense" in one), color="grey", linewidth=0.8)
    axes.set_xlabel("removed / all parameters (grey: untouched)")
    axes.set_ylabel("loss on withheld stories, nats a token")
    axes.legend(title="dashed: after the last cut\nsolid: after recovery", frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
