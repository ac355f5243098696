"""Pipeline: the stages of a run in order; each leaves its result in the run's folder, so a stopped run goes on.

Reads    Settings
Gives    a run folder and RunReport
Source   -
Symbols  P = performance
"""

import gc
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from loraprune.checkpoint import RunState
from loraprune.data import Example, data_hash
from loraprune.errors import UserError
from loraprune.evaluate import measure
from loraprune.examples import show_examples
from loraprune.export import export_model
from loraprune.folder import RunFolder, whole_folder, write_json, write_text
from loraprune.groups import find_groups
from loraprune.inputs import Inputs, prepare, require
from loraprune.mask import LiveMask
from loraprune.metrics import forget_drop, retention, unlearning_efficiency
from loraprune.model import (
    attach_lora,
    checkpoint_bytes,
    device_of,
    load_model,
    load_tokenizer,
    pad_token_id,
    parameter_count,
    quiet_libraries,
    weights_hash,
)
from loraprune.progress import stage
from loraprune.records import KINDS, Outcome, RunReport, removal_columns
from loraprune.report import model_card, result_table, write_report
from loraprune.settings import Settings, as_values
from loraprune.trainer import LoRAPruneTrainer, Target, TrainingSets

Values = dict[str, Any]


def run(settings: Settings, console: Console | None = None) -> RunReport:
    """Unlearn (with a forget set) or compress (without) and return the report.

    A run that was stopped goes on from its folder; of a finished one the report is returned. Raises UserError before
    anything is written when settings, model or data are not fit.
    """
    console = console or Console()
    require(settings)
    folder = RunFolder(Path(settings.output), settings)
    folder.check()
    with quiet_libraries():
        inputs = prepare(settings)
        refuse_changed_inputs(folder, settings, inputs)
        if (metrics := folder.read("metrics.json")) is None:
            folder.open()
            metrics = _run_stages(folder, settings, inputs, console)
        _tidy(folder)
        console.print(result_table(metrics))
        if settings.is_unlearning and metrics["sparsity"] == 0:
            console.print("nothing was cut; what is only suppressed comes back with little training: give --sparsity")
        if settings.show_examples:
            show_examples(settings, inputs, folder.path / "model", console)
    return RunReport(folder.path, metrics, bool(metrics["goal_met"]))


def _run_stages(folder: RunFolder, settings: Settings, inputs: Inputs, console: Console) -> Values:
    folder.stored("inputs.json", lambda: _hashes(settings, inputs))
    before = folder.stored("before.json", lambda: _evaluate_before(folder, settings, inputs))
    target = find_target(settings, before)
    _say_target(target, settings, before, console)
    _say_overlap(inputs, console)
    if not (folder.path / "model").exists():
        _train_and_cut(folder, settings, inputs, before, target)
        gc.collect()  # trainer and model refer to each other: else both would be there beside the model that comes out
    after = folder.stored("after.json", lambda: _evaluate_after(folder, settings, inputs))
    metrics = _metrics(folder, settings, before, after, target)
    _write_evidence(folder, settings, inputs, metrics)
    return metrics


def _hashes(settings: Settings, inputs: Inputs) -> Values:
    data = {name: data_hash(rows) for name, rows in inputs.rows.items()}
    return {"data_sha256": data, "weights_sha256": weights_hash(settings.model)}


def refuse_changed_inputs(folder: RunFolder, settings: Settings, inputs: Inputs) -> None:
    """Raise UserError when the data or the weights are not those that the run in the folder began with."""
    if (begun := folder.read("inputs.json")) is None:
        return
    now = _hashes(settings, inputs)
    changed = [name for name, one in now["data_sha256"].items() if begun["data_sha256"].get(name) != one]
    changed += ["model"] if begun["weights_sha256"] != now["weights_sha256"] else []
    if changed:
        raise UserError(
            f"{', '.join(changed)}: the content has changed since the run in {folder.path} began.",
            "going on would mix two runs, and the evidence would belong to neither.",
            "choose another --output, or bring the old content back.",
        )


@contextmanager
def _timed(folder: RunFolder, name: str) -> Iterator[None]:
    begun = monotonic()
    yield
    folder.event("stage", name=name, duration=round(monotonic() - begun, 3))


# --- before -----------------------------------------------------------------------------------------------------------


def _evaluate_before(folder: RunFolder, settings: Settings, inputs: Inputs) -> Values:
    with _timed(folder, "evaluate"):
        model = load_model(settings.model, settings)
        values = _measure_sets(model, settings, inputs, "before")
        values["parameters"] = parameter_count(model)
        if inputs.forget_for_reference is not None:
            values["reference"] = _measure_reference(settings, inputs.forget_for_reference)
    return values


def _measure_sets(model: torch.nn.Module, settings: Settings, inputs: Inputs, when: str) -> Values:
    values: Values = {}
    size, pad = settings.evaluate_batch_size, pad_token_id(inputs.tokenizer)
    with stage(f"evaluate {when}", sum(map(len, inputs.examples.values()))) as advance:
        for name, examples in inputs.examples.items():
            numbers = measure(model, examples, batch_size=size, pad_token_id=pad, advance=advance)
            values[name] = numbers.as_values()
            advance(0, f"{name} {numbers.performance:.2f}")
    return values


def _measure_reference(settings: Settings, examples: Sequence[Example]) -> Values:
    """Return the reference model's numbers on the forget set."""
    assert settings.reference is not None
    model, pad = load_model(settings.reference, settings), pad_token_id(load_tokenizer(settings.reference, settings))
    return measure(model, examples, batch_size=settings.evaluate_batch_size, pad_token_id=pad).as_values()


def find_target(settings: Settings, before: Mapping[str, Any]) -> Target | None:
    """Return where P(forget) is steered: the reference's, else the holdout's, else as set, else a tenth of before."""
    if not settings.is_unlearning:
        return None
    if "reference" in before:
        value, source = before["reference"]["performance"], "reference"
    elif "holdout" in before:
        value, source = before["holdout"]["performance"], "holdout"
    elif settings.forget_target is not None:
        value, source = settings.forget_target, "forget_target"
    else:
        value, source = before["forget"]["performance"] / 10, "tenth"
    half = settings.band if settings.band is not None else max(0.03, value / 4)
    return Target(value, value - half, value + half, source)


def _say_target(target: Target | None, settings: Settings, before: Mapping[str, Any], console: Console) -> None:
    if target is None:
        return
    meaning = {
        "reference": "the reference model's",
        "holdout": "the untouched model's on the holdout",
        "forget_target": "as set",
        "tenth": "a tenth of the untouched model's; --reference or --holdout would be a natural one",
    }[target.source]
    console.print(
        f"target: P(forget) {target.performance:.3f} ({meaning}), band {max(target.low, 0):.3f} to {target.high:.3f}"
    )
    if settings.forget_target is not None and target.source != "forget_target":
        console.print(f"--forget-target is not used: the {target.source} gives a natural target")
    if before["forget"]["performance"] <= target.high:
        console.print(f"the untouched model is there already: P(forget) is {before['forget']['performance']:.3f}")


def _say_overlap(inputs: Inputs, console: Console) -> None:
    if inputs.overlap is not None and inputs.overlap.near:
        forget, retain, containment = inputs.overlap.near[0]
        console.print(
            f"{len(inputs.overlap.near)} pairs of forget and retain rows are nearly the same; nearest: "
            f"forget row {forget} and retain row {retain}, {containment:.0%} of their phrases"
        )


# --- train, cut -------------------------------------------------------------------------------------------------------


def _train_and_cut(
    folder: RunFolder, settings: Settings, inputs: Inputs, before: Mapping[str, Any], target: Target | None
) -> None:
    base = load_model(settings.model, settings)
    groups = find_groups(base, inputs.config)
    model = attach_lora(base, settings)
    live = LiveMask(model, groups)
    sets = TrainingSets(
        inputs.examples["taught"],
        inputs.examples["floor"],
        inputs.examples.get("forget"),
        pad_token_id(inputs.tokenizer),
    )
    known = {name: before[name]["performance"] for name in ("floor", "forget") if name in before}
    trainer = LoRAPruneTrainer(
        model, settings, sets, live=live, before=known, target=target, folder=folder.path, record=folder.event
    )
    folder.drop_events_after(trainer.first_step)
    trainer.run()
    state = trainer.run_state
    folder.event("stage", name="train", duration=state.train_seconds, score=state.score_seconds)
    _write_decision(folder, state, live)
    with whole_folder(folder.path / "adapter") as part:
        model.save_pretrained(str(part))
        (part / "README.md").unlink(missing_ok=True)  # PEFT's is an empty form
    live.remove()
    export_model(model.merge_and_unload(), inputs.tokenizer, groups, live.value, folder.path / "model")


def _write_decision(folder: RunFolder, state: RunState, live: LiveMask) -> None:
    """Write which groups went, in order, a column for each thing said of them; no clock time, no text."""
    kept = {kind: live.value.kept[kind].sum(1).tolist() for kind in KINDS}
    groups = {
        kind: {"before": sum(len(row) for row in live.value.kept[kind]), "after": sum(kept[kind])} for kind in KINDS
    }
    write_json(
        folder.path / "decision.json",
        {
            "ended_by": state.ended_by,
            "smallest_step": min(map(live.groups.slice_parameters, KINDS)) / live.groups.total_parameters,
            "scores_left_out": state.sensitivities.skipped,  # for a number that was not finite
            "sparsity": live.value.sparsity(live.groups),
            "groups": groups,
            "kept_by_layer": kept,
            "removals": removal_columns(state.removals),
        },
    )
    temporary = folder.path / "mask.safetensors.part"
    save_file({**live.value.kept}, temporary)
    temporary.replace(folder.path / "mask.safetensors")


# --- after ------------------------------------------------------------------------------------------------------------


def _evaluate_after(folder: RunFolder, settings: Settings, inputs: Inputs) -> Values:
    """Measure the written checkpoint, loaded as anyone would load it."""
    with _timed(folder, "evaluate"):
        model = load_model(str(folder.path / "model"), settings)
        return _measure_sets(model, settings, inputs, "after") | {
            "parameters": parameter_count(model),
            "class": type(model).__name__,
        }


def _metrics(folder: RunFolder, settings: Settings, before: Values, after: Values, target: Target | None) -> Values:
    decision = folder.read("decision.json")
    kept = {
        name: retention(before[name]["performance"], after[name]["performance"])
        for name in ("floor", "final", "taught")
    }
    sparsity = (before["parameters"] - after["parameters"]) / before["parameters"]
    floor_held = kept["floor"] >= settings.min_retain_performance
    seconds = _seconds(folder)
    values: Values = {
        "schema": 1,
        "task": "unlearn" if settings.is_unlearning else "prune",
        "model": {
            "parameters": {"before": before["parameters"], "after": after["parameters"]},
            "bytes": {
                "before": checkpoint_bytes(settings.model),
                "after": checkpoint_bytes(str(folder.path / "model")),
            },
            "groups": decision["groups"],
            "class": after["class"],
        },
        "sparsity": sparsity,
        "sparsity_goal": settings.sparsity,
        "scores_left_out": decision["scores_left_out"],
        "forget": None,
        "forget_drop": None,
        "unlearning_efficiency": None,
        "retain": {"before": before["final"], "after": after["final"]},
        "retain_taught": {"before": before["taught"], "after": after["taught"]},
        "holdout": _pair("holdout", before, after),
        "bystander": _pair("bystander", before, after),
        "retention": kept["final"],
        "retention_taught": kept["taught"],
        "floor": {
            "min_retain_performance": settings.min_retain_performance,
            "held": floor_held,
            "retention": kept["floor"],
            "rows": after["floor"]["rows"],
        },
        "target": None,
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(settings),
    }
    if target is not None:
        values |= _forget_metrics(before, after, target, kept["final"], seconds["total"])
    values["outcome"] = _outcome(values, settings, target, decision)
    values["goal_met"] = values["outcome"] == ("target_reached" if target is not None else "budget_spent")
    return values


def _pair(name: str, before: Values, after: Values) -> Values | None:
    return {"before": before[name], "after": after[name]} if name in before else None


def _forget_metrics(before: Values, after: Values, target: Target, kept: float, seconds: float) -> Values:
    drop = forget_drop(before["forget"]["performance"], after["forget"]["performance"])
    removed = before["parameters"] - after["parameters"]
    return {
        "forget": {"before": before["forget"], "after": after["forget"], "reference": before.get("reference")},
        "forget_drop": drop,
        "unlearning_efficiency": unlearning_efficiency(drop, kept, seconds, removed),
        "target": {
            "performance": target.performance,
            "low": target.low,
            "high": target.high,
            "source": target.source,
        },
    }


def _outcome(values: Values, settings: Settings, target: Target | None, decision: Values) -> Outcome:
    """Return what ended the run: the goal, or what stood in its way."""
    enough = settings.sparsity is None or values["sparsity"] >= settings.sparsity - decision["smallest_step"]
    if not values["floor"]["held"]:
        return "floor_reached"
    if enough and target is None:
        return "budget_spent"
    if enough and target is not None and target.holds(values["forget"]["after"]["performance"]):
        return "target_reached"
    if decision["ended_by"] == "floor":
        return "floor_reached"
    return "no_candidates" if not enough or decision["ended_by"] == "no_candidates" else "budget_spent"


def _seconds(folder: RunFolder) -> Values:
    """Return the seconds spent by kind of work, from the events; training counts all starts of a resumed run."""
    stages = [one for one in folder.events() if one["event"] == "stage"]
    train = next(one for one in reversed(stages) if one["name"] == "train")
    evaluate = sum(one["duration"] for one in stages if one["name"] == "evaluate")
    seconds = {
        "score": train["score"],
        "train": train["duration"] - train["score"],
        "evaluate": evaluate,
        "total": train["duration"] + evaluate,
    }
    return {name: round(one, 3) for name, one in seconds.items()}


def _peak_memory(settings: Settings) -> int:
    if device_of(settings).type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write_evidence(folder: RunFolder, settings: Settings, inputs: Inputs, metrics: Values) -> None:
    """Write what shows the result and what reproduces it; metrics.json comes last and marks the run as finished."""
    numbers = {name: [row.number for row in rows] for name, rows in inputs.rows.items()}
    write_json(folder.path / "split.json", {name: numbers[name] for name in ("taught", "floor", "final")})
    hashes = folder.read("inputs.json")
    libraries = ("loraprune", "torch", "transformers", "peft", "accelerate")
    reproduce = {
        "seed": settings.seed,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "weights_sha256": {
            "before": hashes["weights_sha256"],
            "after": weights_hash(str(folder.path / "model")),
        },
        "data_sha256": hashes["data_sha256"],
    }
    write_json(folder.path / "reproduce.json", reproduce)
    write_text(folder.path / "model" / "README.md", model_card(as_values(settings), metrics))
    folder.event("stop", outcome=metrics["outcome"], sparsity=metrics["sparsity"])
    write_json(folder.path / "metrics.json", metrics)


def _tidy(folder: RunFolder) -> None:
    """Give a finished run what follows from its metrics, unless it has it: the report, and no saved state."""
    if not (folder.path / "report.html").exists():
        write_report(folder.path)
    shutil.rmtree(folder.path / "state", ignore_errors=True)
    logs = folder.path / "logs"
    if logs.exists() and not any(logs.iterdir()):
        logs.rmdir()
