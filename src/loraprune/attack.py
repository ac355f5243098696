"""Attack: try to bring back what a run made its model forget; the original and the reference get the same treatment.

Reads    a run's folder: config.toml, inputs.json, model/; the run's data; attacks.json where an earlier call left one
Gives    attack_run, and attacks.json, written anew after every attack on every model
Source   -
Symbols  a unit = one attack in one way, such as relearn_lora; a role = unlearned, original or reference
"""

import gc
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from filelock import FileLock, Timeout

from loraprune.attack_findings import findings_of
from loraprune.attack_lens import look_inside
from loraprune.attack_relearn import relearn, retrain
from loraprune.attack_samples import sample
from loraprune.attack_weights import prune_again, quantise
from loraprune.attack_wording import rephrase
from loraprune.attacked import Attack, AttackedModel, AttackRows, NotRun, Role, Values, split_halves
from loraprune.data import Row, data_hash
from loraprune.errors import UserError, nearest
from loraprune.folder import PATIENCE, write_json
from loraprune.inputs import load_set, split_kept
from loraprune.model import check_machine, checked_config, device_of, quiet_libraries, weights_hash
from loraprune.progress import stage
from loraprune.row_scores import EncodedSet, refuse_other_tokens
from loraprune.setting import flag
from loraprune.settings import Settings
from loraprune.settings_file import settings_from

RESULTS, LOCK, SCHEMA = "attacks.json", "attacks.lock", 1
ROLES: tuple[Role, ...] = get_args(Role)

UNITS: Mapping[str, Mapping[str, Attack]] = {
    "relearn": {
        "relearn_full": partial(relearn, weights="all"),
        "relearn_lora": partial(relearn, weights="lora"),
    },
    "retrain": {
        "retrain_full": partial(retrain, weights="all"),
        "retrain_lora": partial(retrain, weights="lora"),
    },
    "quantise": {
        "quantise_int8": partial(quantise, number_format="int8"),
        "quantise_nf4": partial(quantise, number_format="nf4"),
    },
    "sample": {"sample": sample},
    "rephrase": {"rephrase": rephrase},
    "prune_again": {"prune_again": prune_again},
    "look_inside": {"look_inside": look_inside},
}
ALL_UNITS = {unit: one for units in UNITS.values() for unit, one in units.items()}

# What results depend on, beside weights and rows: under another value of these they may not be mixed.
CONDITIONS = (
    *("dtype", "columns", "template", "max_length", "forget_batch_size", "retain_batch_size", "evaluate_batch_size"),
    *("attack_steps", "attack_learning_rate", "attack_samples", "attack_rows", "attack_sparsity", "learning_rate"),
    *("max_gradient_norm", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "seed"),
)


PROGRAM = ("loraprune", "torch", "transformers")  # what computes the results


def attack_run(folder: Path, given: Mapping[str, Any]) -> Values:
    """Run the attacks that are not done yet on every model of the run in `folder`; return the content of attacks.json.

    `given`: settings in place of the run's own. A killed call is taken up where it was; the same seed gives the same
    file. Raises UserError where the folder is no finished run, where something it names is not there any more, and
    where attacks.json holds results under other settings.
    """
    begun = _run_settings(folder)
    settings = settings_from({**begun, **given, "output": str(folder)})
    _refuse_unknown(settings.attacks)
    check_machine(settings)
    with quiet_libraries(), _alone(folder):
        models = _models(folder, settings, settings_from(begun).seed)
        report = _begin(folder, settings, models)
        units = [unit for name in UNITS if name in settings.attacks for unit in UNITS[name]]
        for unit in units:
            for model in models:
                if not _is_done(report, unit, model.role):
                    report["results"].setdefault(unit, {})[model.role] = _attack_one(unit, model)
                    _write(folder, report)
        return _write(folder, report)


def _attack_one(unit: str, model: AttackedModel) -> Values:
    """Run one unit on one model, and let go of the model's memory."""
    with stage(f"{unit} on the {model.role}", 1) as advance:
        try:
            values = ALL_UNITS[unit](model, advance).as_values()
        except NotRun as reason:
            return {"not_run": str(reason)}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"device": str(device_of(model.settings)), **values}


# --- what is attacked -------------------------------------------------------------------------------------------------


def _run_settings(folder: Path) -> Values:
    """Return the settings of a finished run of unlearn, as plain values."""
    config = folder / "config.toml"
    if not config.exists():
        raise UserError(
            f"{folder} is no run: it holds no config.toml.",
            "models, data and settings of the attacks are those of a run.",
            "give the folder that was --output of loraprune unlearn.",
        )
    values = tomllib.loads(config.read_text(encoding="utf-8"))
    if "forget" not in values:
        raise UserError(
            f"the run in {folder} forgot nothing: it has no forget set.",
            "what was never to be forgotten cannot be brought back.",
            "give the folder of a run of loraprune unlearn.",
        )
    if not (folder / "model").is_dir():
        raise UserError(
            f"the run in {folder} is not finished: it holds no model.",
            "attacks are run on the model that comes out.",
            f"go on with it first; loraprune status {folder} says how far it is.",
        )
    return values


def _refuse_unknown(attacks: tuple[str, ...]) -> None:
    for name in attacks:
        if name not in UNITS:
            close = nearest(name, UNITS)
            raise UserError(
                f"there is no attack {name}.",
                f"attacks are {', '.join(UNITS)}.",
                f"did you mean {close}?" if close else "name some of these in --attacks.",
            )


def _models(folder: Path, settings: Settings, run_seed: int) -> list[AttackedModel]:
    rows = _rows(settings, run_seed)
    _refuse_other_inputs(folder, settings, rows)
    names = {"unlearned": str(folder / "model"), "original": settings.model, "reference": settings.reference}
    models = []
    for role in ROLES:
        if (name := names[role]) is not None:
            _check_model(role, name, settings)
            models.append(AttackedModel.of(role, name, settings, rows))
    for other in models[1:]:
        refuse_other_tokens(
            *(EncodedSet("forget", rows.forget, one.examples(rows.forget), ()) for one in (models[0], other))
        )
    return models


def _rows(settings: Settings, run_seed: int) -> AttackRows:
    if settings.forget is None or settings.retain is None:
        raise ValueError("a run of unlearn names both sets")
    forget = load_set(settings, "forget", settings.forget)
    kept = split_kept(replace(settings, seed=run_seed), load_set(settings, "retain", settings.retain))
    shown, hidden = split_halves(forget, settings.seed)
    return AttackRows(forget, kept["taught"], shown, hidden)


def _check_model(role: Role, name: str, settings: Settings) -> None:
    """Raise UserError, naming the setting, where a model that the run names is not there any more."""
    try:
        checked_config(name, settings)
    except UserError as error:
        if role == "unlearned":
            raise
        setting = {"original": "model", "reference": "reference"}[role]
        raise UserError(
            f"the {role} model of the run cannot be had: {error.what}",
            f"the run's config.toml names it as {setting}; {error.why}",
            f"give {flag(setting)} the place where it is now.",
        ) from error


def _refuse_other_inputs(folder: Path, settings: Settings, rows: AttackRows) -> None:
    """Raise UserError where data or the original are not those that the run began with, by their hashes."""
    path = folder / "inputs.json"
    if not path.exists():
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    now = {"forget": data_hash(rows.forget), "retain": data_hash(rows.taught), "model": weights_hash(settings.model)}
    then = {"forget": begun["data_sha256"]["forget"], "retain": begun["data_sha256"]["taught"]}
    for name, one in {**then, "model": begun["weights_sha256"]}.items():
        if now[name] != one:
            raise UserError(
                f"{name} is not what the run in {folder} began with: its content differs.",
                "an attack on other rows or another original would say nothing of this run.",
                f"give {flag(name)} the place where the run's own is now.",
            )


# --- attacks.json -----------------------------------------------------------------------------------------------------


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second call on the same folder out while the block runs."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(
            f"{folder} is under attack by another process.",
            "two processes would overwrite each other's attacks.json.",
            "wait for that process or end it, then give the same command.",
        ) from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: nobody may wait on a name that goes
        lock.release()


def _begin(folder: Path, settings: Settings, models: list[AttackedModel]) -> Values:
    """Return the report of earlier calls, once it is known to be of these models, rows and settings; or a new one."""
    now = _conditions(settings, models)
    path = folder / RESULTS
    if not path.exists():
        return {"schema": SCHEMA, "conditions": now, "results": {}}
    report = json.loads(path.read_text(encoding="utf-8"))
    _refuse_other_conditions(path, report["conditions"], now)
    for name, one in report["conditions"].items():
        now[name] = {**one, **now[name]}
    return {"schema": SCHEMA, "conditions": now, "results": report["results"]}


def _conditions(settings: Settings, models: list[AttackedModel]) -> Values:
    values = {name: getattr(settings, name) for name in CONDITIONS}
    rows = models[0].rows
    sets: dict[str, Any] = {"forget": rows.forget, "taught": rows.taught, "shown": rows.shown, "hidden": rows.hidden}
    return {
        "settings": json.loads(json.dumps(values)),
        "program": {**{name: version(name) for name in PROGRAM}, "device": device_of(settings).type},
        "weights_sha256": {one.role: weights_hash(one.name) or one.name for one in models},
        "data_sha256": {name: _content_hash(one) for name, one in sets.items()},
        "rows": {name: len(one) for name, one in sets.items()},
    }


def _content_hash(rows: Sequence[Row]) -> str:
    """Return a hash of everything that a row holds, paraphrases and wrong answers too."""
    return sha256(json.dumps([astuple(replace(row, number=0)) for row in rows]).encode()).hexdigest()


def _refuse_other_conditions(path: Path, then: Values, now: Values) -> None:
    for part, values in now.items():
        for name, one in values.items():
            before = then.get(part, {})
            if name in before and before[name] != one:
                told = part in ("settings", "program")
                shown = f"{name} was {before[name]}, now {one}" if told else f"{name}: other content"
                raise UserError(
                    f"{path} holds results under other conditions: {shown}.",
                    "models attacked in different ways cannot be compared.",
                    f"go back to what it was, or move {path.name} away to attack anew.",
                )


def _is_done(report: Values, unit: str, role: Role) -> bool:
    """Say whether a result is there; one that could not be had is tried again, for the reason may be gone."""
    result = report["results"].get(unit, {}).get(role)
    return result is not None and "not_run" not in result


def _write(folder: Path, report: Values) -> Values:
    """Write the report with its findings, in an order that does not depend on which result came first."""
    units = [unit for unit in ALL_UNITS if unit in report["results"]]
    found = {unit: report["results"][unit] for unit in units}
    report["results"] = {unit: {role: one[role] for role in ROLES if role in one} for unit, one in found.items()}
    report["findings"] = findings_of(report["results"], list(report["conditions"]["weights_sha256"]))
    write_json(folder / RESULTS, report)
    return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
