"""Pipeline: the stages of a run in order; each leaves its result in the run's folder, so a stopped run goes on.

Reads    Settings
Gives    a run folder and RunReport
Source   -
Symbols  P = performance; original = the model before the first request, the given model where this is the first
"""

import gc
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console

from loraprune.adapter import adapter_folder, adapter_hash, load_adapter
from loraprune.balance import TrainingSets
from loraprune.checkpoint import RunState
from loraprune.data import Example, data_hash, examples_hash
from loraprune.ending import END, Written, save_adapter, write_best, write_decision
from loraprune.errors import UserError
from loraprune.evaluate import Measured, measure
from loraprune.examples import show_examples
from loraprune.export import export_model
from loraprune.folder import RunFolder, write_json, write_text
from loraprune.forms import form_of
from loraprune.inputs import Inputs, earlier_sets, prepare, require
from loraprune.launch import here
from loraprune.ledger import FILE as LEDGER
from loraprune.ledger import Ledger, read_ledger, removed_by_layer
from loraprune.mask import LiveMask
from loraprune.model import (
    attach_lora,
    base_groups,
    device_of,
    load_base,
    load_measured,
    load_tokenizer,
    pad_token_id,
    parameter_count,
    quiet_libraries,
    takes_adapters_in,
    weights_hash,
)
from loraprune.processes import all_do, first_does, refuse_different, shard, working_as_one
from loraprune.progress import stage
from loraprune.pruning import ModelState
from loraprune.quantised import quietly
from loraprune.records import ModelGroups, RunReport, removals_from
from loraprune.report import model_card, result_table, write_report
from loraprune.result import KEPT, WITHHELD, last_look, metrics_of
from loraprune.rules import Rules
from loraprune.settings import PLAIN_BITS, Settings, as_values
from loraprune.steering import (
    LEAST_ROWS,
    NOT_LOOKED_AT,
    Probe,
    Probes,
    Steering,
    Target,
    find_ceilings,
    find_limits,
    find_spread,
    find_target,
    scale_original,
)
from loraprune.trainer import LoRAPruneTrainer
from loraprune.words import FORMS, counted, position

Values = dict[str, Any]
LEAST_GUARD_LOSS = 0.01  # nats; a text known by heart is no measure of language ability
FEW_FACTS = 15  # of the floor; fewer tell little of the others


def run(settings: Settings, console: Console | None = None) -> RunReport:
    """Unlearn (with a forget set) or compress (without) and return the report.

    A run that was stopped goes on from its folder; of a finished one the report is returned. Several processes of one
    launch share the work, and the first of them writes. Raises UserError before anything is trained when settings,
    model or data are not fit; then no file of the run is left behind.
    """
    console = (console or Console()) if here().first else Console(quiet=True)
    require(settings)
    folder = RunFolder(Path(settings.output), settings)
    with working_as_one(settings), quiet_libraries():
        first_does(folder.check)
        inputs = all_do(lambda: prepare(settings))
        if here().count > 1:
            refuse_different(_hashes(settings, inputs), "model and data")
        with folder.held(console.print):
            first_does(lambda: refuse_changed_inputs(folder, settings, inputs))
            if (metrics := first_does(lambda: folder.read("metrics.json"))) is None:
                folder.open()
                with folder.withdrawn_if_refused():
                    metrics = _run_stages(folder, inputs.settings, inputs, console)
            first_does(lambda: _tidy(folder))
        console.print(result_table(metrics))
        _say_next(settings, metrics, console)
        if metrics["model"].get("form") == "per_layer":
            console.print(
                f"checkpoint: {FORMS['per_layer']}; transformers loads it with trust_remote_code=True, "
                "loraprune.load_pruned without running code from the folder"
            )
        if settings.show_examples:
            shown = replace(settings, device="cpu") if here().sharded else settings  # one GPU may not hold the model
            first_does(lambda: show_examples(shown, inputs, folder.path / "model", console))
    return RunReport(folder.path, metrics, bool(metrics["goal_met"]))


def _run_stages(folder: RunFolder, settings: Settings, inputs: Inputs, console: Console) -> Values:
    hashes = folder.stored("inputs.json", lambda: first_does(lambda: _hashes(settings, inputs)))
    ledger = read_ledger(settings.model, hashes["weights_sha256"])
    ledger.next_id(settings.request_id)
    before = folder.stored("before.json", lambda: _evaluate_before(folder, settings, inputs))
    original = folder.stored("original.json", lambda: _evaluate_original(folder, settings, inputs, ledger, before))
    steering = _steering(settings, inputs, before, original)
    refuse_lost_floor(settings, before, original)
    _say_target(steering.target, settings, before, console)
    _say_steering(settings, steering, original, ledger, console)
    _say_overlap(inputs, console)
    if not folder.has("model"):
        _train_and_cut(folder, settings, inputs, steering, before, original)
        gc.collect()  # trainer and model refer to each other: else both would be there beside the model that comes out
    after = folder.stored("after.json", lambda: _evaluate_after(folder, settings, inputs))

    def end() -> Values:
        metrics = metrics_of(folder, settings, inputs, steering, before, original, after)
        _write_evidence(folder, settings, inputs, ledger, original, metrics)
        return folder.read("metrics.json")

    return first_does(end)


def _hashes(settings: Settings, inputs: Inputs) -> Values:
    data = {name: data_hash(rows) for name, rows in inputs.rows.items()}
    others = {name: getattr(settings, name) for name in ("reference", "original")}
    adapter = {} if settings.adapter is None else {"adapter": adapter_hash(adapter_folder(settings.adapter))}
    return {
        "data_sha256": data,
        "weights_sha256": weights_hash(settings.model),
        "others_sha256": {name: weights_hash(one) for name, one in others.items() if one} | adapter,
    }


def refuse_changed_inputs(folder: RunFolder, settings: Settings, inputs: Inputs) -> None:
    """Raise UserError when the data or the weights are not those that the run in the folder began with."""
    if (begun := folder.read("inputs.json")) is None:
        return
    now = _hashes(settings, inputs)
    changed = [name for name, one in now["data_sha256"].items() if begun["data_sha256"].get(name) != one]
    others = now["others_sha256"]
    changed += [name for name in others if begun["others_sha256"].get(name) != others[name]]
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
    """Measure the given model on every set, then the reference on what is to be forgotten; one model at a time."""
    with _timed(folder, "evaluate"):
        values, parameters = _measure_given(settings, inputs)
        values["parameters"] = parameters
        if inputs.for_reference:
            model, tokenizer = load_measured(settings.reference or "", settings), _reference_tokenizer(settings)
            values["reference"] = {
                name: _measured(model, examples, settings, pad_token_id(tokenizer)).as_values(inputs.facts[name])
                for name, examples in inputs.for_reference.items()
            }
    return values


def _measure_given(settings: Settings, inputs: Inputs) -> tuple[Values, int]:
    model = load_measured(settings.model, settings)
    return measure_sets(model, settings, inputs, list(inputs.examples), "evaluate before"), parameter_count(model)


def _reference_tokenizer(settings: Settings) -> Any:
    return load_tokenizer(settings.reference or "", settings)


def _measured(
    model: torch.nn.Module, examples: Sequence[Example], settings: Settings, pad: int, advance: Any = lambda rows: None
) -> Measured:
    return measure(model, examples, batch_size=settings.evaluate_batch_size, pad_token_id=pad, advance=advance)


def measure_sets(
    model: torch.nn.Module, settings: Settings, inputs: Inputs, names: Sequence[str], title: str
) -> Values:
    """Return the named sets' numbers, and under "rows" P of each withheld row, for the interval of retention.

    Of each holdout row too, for how far apart such rows lie.
    """
    values: Values = {"rows": {}}
    pad, facts = pad_token_id(inputs.tokenizer), inputs.facts
    with stage(title, sum(len(inputs.examples[name]) for name in names)) as advance:
        for name in names:
            examples = inputs.examples[name]
            numbers = _measured(model, examples, settings, pad, advance)
            values[name] = numbers.as_values(facts[name])
            if name in (*WITHHELD, "holdout"):
                values["rows"][name] = list(numbers.row_performance)
            advance(0, f"{name} {numbers.performance:.2f}")
    return values


def _evaluate_original(folder: RunFolder, settings: Settings, inputs: Inputs, ledger: Ledger, before: Values) -> Values:
    names = [name for name in (*KEPT, "guard") if name in inputs.examples]
    with _timed(folder, "evaluate"):
        return find_original(settings, inputs, ledger, before, names)


def find_original(settings: Settings, inputs: Inputs, ledger: Ledger, before: Values, names: Sequence[str]) -> Values:
    """Return what the original model knew of the named sets, and whether it was measured or recorded.

    It is measured where --original names it, else read from the ledger where that knows the very rows in the same form,
    else taken to be the given model.
    """
    measured = _measure_original(settings, inputs, names) if settings.original else None
    values: Values = {"sets": {}, "source": {}}
    for name in names:
        examples = examples_hash(inputs.examples[name])
        recorded = ledger.known(name, examples)
        source = "measured" if measured else "ledger" if recorded else "given model"
        numbers = measured[name] if measured else recorded or _kept_numbers(before[name], before["rows"].get(name))
        values["sets"][name] = {**numbers, "examples_sha256": examples}
        values["source"][name] = source
    return values


def _measure_original(settings: Settings, inputs: Inputs, names: Sequence[str]) -> Values:
    model, pad = load_measured(settings.original or "", settings), pad_token_id(inputs.tokenizer)
    measured = {name: _measured(model, inputs.examples[name], settings, pad) for name in names}
    return {
        name: _kept_numbers(one.as_values(inputs.facts[name]), list(one.row_performance) if name in WITHHELD else None)
        for name, one in measured.items()
    }


def _kept_numbers(numbers: Mapping[str, Any], rows: Sequence[float] | None) -> Values:
    values = {name: numbers[name] for name in ("performance", "loss")}
    return values if rows is None else {**values, "row_performance": list(rows)}


def _steering(settings: Settings, inputs: Inputs, before: Values, original: Values) -> Steering:
    """Return what steers the run."""
    examples, facts, earlier = inputs.examples, inputs.facts, list(earlier_sets(settings))
    target, ceilings = find_target(settings, before), find_ceilings(settings, before, earlier)
    probes = Probes(
        Probe(examples["floor"], facts["floor"]),
        original["sets"]["floor"]["row_performance"],
        pad_token_id(inputs.tokenizer),
        settings.evaluate_batch_size,
        Probe(examples["forget"], facts["forget"]) if "forget" in examples else None,
        examples.get("guard", ()),
        original["sets"]["guard"]["loss"] if "guard" in examples else 0.0,
        tuple(examples[name] for name in earlier),
    )
    limits = find_limits(settings, before, target, ceilings)
    spread = find_spread(settings, before, target)
    return Steering(probes, limits, target, ceilings, before["forget"]["performance"] if target else None, spread)


def refuse_lost_floor(settings: Settings, before: Values, original: Values) -> None:
    """Raise UserError where the given model itself breaks what the run must keep, or where that cannot be measured."""
    known = original["sets"]["floor"]["performance"]
    if not known > 0:
        raise UserError(
            f"P of the floor rows is {known:g} before anything was done.",
            "retention is P after / P before; of what the model does not know nothing can be kept.",
            "give a --retain set that the model knows, of the same form as it was trained on (--template).",
        )
    if (kept := before["floor"]["performance"] / known) < settings.min_retain_performance:
        raise UserError(
            f"the given model keeps {kept:.3f} of what the original knew of the floor rows; "
            f"the floor is {settings.min_retain_performance:g}.",
            "every step would break the floor, the first one included.",
            "lower --min-retain-performance, or start from an earlier model.",
        )
    if "guard" in before:
        _refuse_lost_guard(settings, before["guard"]["loss"], original["sets"]["guard"]["loss"])


def _refuse_lost_guard(settings: Settings, now: float, known: float) -> None:
    if not known >= LEAST_GUARD_LOSS:
        raise UserError(
            f"the loss on the guard text is {known:.2g} before anything was done.",
            "the model knows it by heart, and a ratio of losses near nothing measures no general ability.",
            "give --guard other text, and this one as --retain or --bystander.",
        )
    if not now / known <= settings.max_guard_loss_ratio:
        raise UserError(
            f"the given model's loss on the guard text is {now / known:.3f} times the original's; "
            f"at most {settings.max_guard_loss_ratio:g} is allowed.",
            "every step would break this floor, the first one included.",
            "raise --max-guard-loss-ratio, or start from an earlier model.",
        )


def _say_target(target: Target | None, settings: Settings, before: Mapping[str, Any], console: Console) -> None:
    if target is None:
        return
    meaning = {
        "reference": "the reference model's",
        "holdout": "the untouched model's on the holdout",
        "forget_target": "as set",
        "tenth": "a tenth of the untouched model's; better: --reference, a model trained without the forget set, or "
        "--holdout, data of its kind that the model never saw",
    }[target.source]
    console.print(
        f"target: P(forget) {target.performance:.3f} ({meaning}), band {max(target.low, 0):.3f} to {target.high:.3f}"
    )
    if settings.forget_target is not None and target.source != "forget_target":
        console.print(f"--forget-target is not used: the {target.source} gives a natural target")
    if before["forget"]["performance"] <= target.high:
        console.print(f"the untouched model is there already: P(forget) is {before['forget']['performance']:.3f}")


def _say_steering(settings: Settings, steering: Steering, original: Values, ledger: Ledger, console: Console) -> None:
    """Say how forget rows are steered, against which model the floor holds, and how surely a set can tell."""
    if steering.spread:
        console.print(f"forget rows: steered as far apart as the holdout's {len(steering.spread)} rows")
    elif settings.natural_spread and settings.holdout is not None:
        console.print(f"forget rows: steered by their mean; a holdout of fewer than {LEAST_ROWS} rows tells no more")
    facts = len(set(steering.probes.floor.facts))
    if steering.limits.min_retain_performance:
        rows = f"{counted(len(steering.probes.floor.examples), 'row')} of {counted(facts, 'fact')}"
        least = f"retention >= {steering.limits.min_retain_performance:g} on {rows}"
        console.print(f"floor: {least}{say_few(facts)}")
    if ledger.of_other_weights:
        console.print(
            "the ledger that lies beside the model is of other weights and was left aside: this counts as a first "
            "request, and the floor holds against the given model; --original names another"
        )
    if ledger.entries and original["source"]["floor"] == "given model":
        console.print(
            "the floor holds against the given model, not against the one before the first request: the ledger knows "
            "other floor rows; --original names that model"
        )
    for number, one in enumerate(steering.ceilings, start=1):
        console.print(f"ceiling: P of --already-forgotten {number} at most {one.high:.3f}")


def _say_next(settings: Settings, metrics: Values, console: Console) -> None:
    """Say what to give another time, where the end was one that settings can mend."""
    if not settings.is_unlearning:
        return
    if metrics["sparsity"] == 0:
        console.print("nothing was cut; what is only suppressed comes back with little training: give --sparsity")
    looked_ahead = settings.pushes_down and settings.relearning_radius > 0
    short_of_room = metrics["outcome"] == "floor_reached" and {"floor", "room"} & metrics["breaks"].keys()
    known = metrics["forget"]["after"]["performance"]
    if looked_ahead and short_of_room and position(known, metrics["target"]) == "above":
        console.print(
            "looking ahead takes room above the floor: --relearning-radius 0 leaves it to forgetting, and what is "
            "forgotten then comes back sooner when a part of it is learnt again"
        )


def say_few(facts: int) -> str:
    """Return what to add where the floor stands on few facts: of 0.86 on 10, the interval was 0.72 to 0.95."""
    if facts < 2:
        return "; one fact alone has no sampling error: add rows to --retain"
    return "; few facts, so sure to a tenth at best: add rows to --retain" if facts < FEW_FACTS else ""


def _say_overlap(inputs: Inputs, console: Console) -> None:
    if inputs.overlap is not None and inputs.overlap.near:
        forget, retain, containment = inputs.overlap.near[0]
        console.print(
            f"{len(inputs.overlap.near)} pairs of forget and retain rows are nearly the same; nearest: "
            f"forget row {forget} and retain row {retain}, {containment:.0%} of their phrases"
        )


# --- train, cut -------------------------------------------------------------------------------------------------------


def _train_and_cut(
    folder: RunFolder, settings: Settings, inputs: Inputs, steering: Steering, before: Values, original: Values
) -> None:
    if takes_adapters_in(settings):
        trainer = _train(folder, settings, inputs, steering, load_base(settings.model, settings))
        first_does(lambda: _write_trained(folder, inputs, trainer))
        return
    with quietly():
        if settings.base_bits < PLAIN_BITS:
            trained = _train_quantised(folder, settings, inputs, steering, before, original)
        else:
            trained = _ends_of(_train(folder, settings, inputs, steering, load_base(settings.model, settings)))
    ends, groups, state = trained
    gc.collect()  # the base that was trained on goes before the original comes
    written = write_best(ends, groups, inputs.tokenizer, settings, steering, folder.path)
    if written.end is not ends[0]:
        tried = ends[0].mask.sparsity(groups)
        folder.event("roll_back", step=state.step, **written.look.as_values(), broken=written.broken, tried=tried)
        state.breaks |= {name: state.breaks.get(name, 0) + 1 for name in written.broken}
    if written.end is ends[-1]:
        state.removals, state.ended_by = [], written.broken[0]
    first_does(lambda: _name_best(folder, settings, groups, state, written))


def _write_trained(folder: RunFolder, inputs: Inputs, trainer: LoRAPruneTrainer) -> None:
    live = trainer.live
    write_decision(folder.path, trainer.run_state, live.groups, live.value, trainer.rules)
    save_adapter(trainer.adapted, folder.path / "adapter")
    live.remove()
    plain: Any = trainer.adapted.merge_and_unload()
    export_model(plain, inputs.tokenizer, live.groups, live.value, folder.path / "model")


def _name_best(folder: RunFolder, settings: Settings, groups: ModelGroups, state: RunState, best: Written) -> None:
    write_decision(folder.path, state, groups, best.end.mask, Rules.of(settings))
    for other in folder.path.glob(f"{END}-*"):
        if other != best.path:
            shutil.rmtree(other)
    best.path.replace(folder.path / "model")  # last: a run that has a model is not cut again, and would keep the others


def _train_quantised(
    folder: RunFolder, settings: Settings, inputs: Inputs, steering: Steering, before: Values, original: Values
) -> tuple[list[ModelState], ModelGroups, RunState]:
    """Train on the quantised base, steered by what that base itself knew, and return what may be written."""
    base = load_base(settings.model, settings)
    names = [name for name in inputs.examples if name not in NOT_LOOKED_AT]
    rounded = folder.stored("quantised.json", lambda: measure_sets(base, settings, inputs, names, "measure quantised"))
    scaled = scale_original(original, before, rounded)
    own = _steering(settings, inputs, {**before, **rounded}, scaled)
    limits = find_limits(settings, {**before, **rounded}, steering.target, own.ceilings)
    own = replace(own, target=steering.target, limits=limits, spread=steering.spread)
    return _ends_of(_train(folder, settings, inputs, own, base))


def _ends_of(trainer: LoRAPruneTrainer) -> tuple[list[ModelState], ModelGroups, RunState]:
    return trainer.ends(), trainer.live.groups, trainer.run_state


def _train(folder: RunFolder, settings: Settings, inputs: Inputs, steering: Steering, base: Any) -> LoRAPruneTrainer:
    groups = base_groups(base, inputs.config, settings.attention_unit)
    model = attach_lora(base, settings)
    if settings.adapter is not None:
        load_adapter(model, adapter_folder(settings.adapter))
    if here().sharded:
        shard(model, device_of(settings))
    sets = TrainingSets(
        inputs.trained,
        inputs.examples.get("forget"),
        pad_token_id(inputs.tokenizer),
        steering.probes.already_forgotten,
    )
    trainer = LoRAPruneTrainer(
        model, settings, sets, live=LiveMask(model, groups), steering=steering, folder=folder.path, event=folder.event
    )
    folder.drop_events_after(trainer.first_step if trainer.run_state.good_look else -1)
    folder.event("begin", step=trainer.first_step, **_outlook(settings, steering, groups.total_parameters, trainer))
    trainer.run()
    state = trainer.run_state
    folder.event("stage", name="train", duration=state.train_seconds, score=state.score_seconds)
    return trainer


def _outlook(settings: Settings, steering: Steering, parameters: int, trainer: LoRAPruneTrainer) -> Values:
    """Return what a reader of the events needs to know of the run that begins or goes on."""
    limits, target = steering.limits, steering.target
    guard = {} if limits.max_guard_loss_ratio is None else {"max_guard_loss_ratio": limits.max_guard_loss_ratio}
    return {
        "task": "unlearn" if settings.is_unlearning else "prune",
        "parameters": parameters,
        "steps": trainer.run_state.end,
        "sparsity_goal": settings.sparsity,
        "target": target.as_values() if target else None,
        "min_retain_performance": limits.min_retain_performance,
        "floor_rows": len(steering.probes.floor.examples),
        "floor_facts": len(set(steering.probes.floor.facts)),
        **guard,
        **({"ceilings": list(limits.ceilings)} if limits.ceilings else {}),
    }


# --- after ------------------------------------------------------------------------------------------------------------


def _evaluate_after(folder: RunFolder, settings: Settings, inputs: Inputs) -> Values:
    """Measure the written checkpoint, loaded as anyone would load it."""
    with _timed(folder, "evaluate"):
        model = load_measured(str(folder.path / "model"), settings)
        return measure_sets(model, settings, inputs, list(inputs.examples), "evaluate after") | {
            "parameters": parameter_count(model),
            "class": type(model).__name__,
            "form": form_of(model.config),
        }


def _write_evidence(
    folder: RunFolder, settings: Settings, inputs: Inputs, ledger: Ledger, original: Values, metrics: Values
) -> None:
    """Write what shows the result and what reproduces it; metrics.json comes last and marks the run as finished."""
    numbers = {name: [row.number for row in rows] for name, rows in inputs.rows.items()}
    write_json(folder.path / "split.json", {name: numbers[name] for name in ("taught", "floor", "final")})
    reproduce = _reproduction(folder, settings, ledger, original, metrics)
    write_json(folder.path / LEDGER, reproduce)
    write_json(folder.path / "model" / LEDGER, reproduce)  # the ledger goes where the model goes
    write_text(folder.path / "model" / "README.md", model_card(as_values(folder.settings), metrics))
    decision = folder.read("decision.json")
    ends = {"outcome": metrics["outcome"], "ended_by": decision["ended_by"], "form": metrics["model"]["form"]}
    if all(one["event"] != "stop" for one in folder.events()):  # told already where a kill came before what follows
        folder.event("stop", step=decision["steps"], **ends, **last_look(metrics, decision["kept_by_layer"]))
    write_json(folder.path / "metrics.json", metrics)


def _reproduction(folder: RunFolder, settings: Settings, ledger: Ledger, original: Values, metrics: Values) -> Values:
    """Return what reproduces the run, and the ledger with this request in it; data by their hashes alone."""
    hashes, decision = folder.read("inputs.json"), folder.read("decision.json")
    weights = {"before": hashes["weights_sha256"], "after": weights_hash(str(folder.path / "model"))}
    entry = {
        "request_id": ledger.next_id(settings.request_id),
        "task": metrics["task"],
        "outcome": metrics["outcome"],
        "parent_sha256": weights["before"],
        "weights_sha256": weights["after"],
        "data_sha256": hashes["data_sha256"],
        "removed": removed_by_layer(removals_from(decision["removals"]), decision["kept_by_layer"]),
    }
    first = {} if ledger.entries else original["sets"]
    found = {name: one for name, one in original["sets"].items() if original["source"][name] != "given model"}
    libraries = ["loraprune", "torch", "transformers", "peft", "accelerate"]
    libraries += ["bitsandbytes"] if settings.base_bits != PLAIN_BITS else []
    return {
        "seed": settings.seed,
        "processes": {"count": here().count, "sharded": here().sharded},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "weights_sha256": {**weights, **hashes["others_sha256"]},
        "data_sha256": hashes["data_sha256"],
        "ledger": [*ledger.entries, entry],
        "original": {**(ledger.original or {}), **first, **found},
    }


def _tidy(folder: RunFolder) -> None:
    """Give a finished run what follows from its metrics, unless it has it: the report, and no saved state."""
    if not (folder.path / "report.html").exists():
        write_report(folder.path)
    shutil.rmtree(folder.path / "state", ignore_errors=True)
    logs = folder.path / "logs"
    if logs.exists() and not any(logs.iterdir()):
        logs.rmdir()
