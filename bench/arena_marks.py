"""Marks of the arena: what is measured of a checkpoint, and what that is worth beside the original and the reference.

Reads    a world, a checkpoint of it
Gives    measure_marks, marks_key; judge: the numbers of one contestant on one seed; half_width: of an interval over
         seeds; paired: differences by seed
Source   closeness and the harmonic means: open-unlearning, arXiv 2506.12618; every number is the product's
Symbols  P = performance, ES = extraction strength; closeness(x) = 1 - |x - reference's| / what it can be at most
"""

import ctypes
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from statistics import fmean, stdev
from time import perf_counter, process_time
from typing import Any

import torch
from arena_worlds import CACHE, Values, World
from scipy.stats import hmean
from scipy.stats import t as student
from speed import prefill_seconds, ratio

from loraprune.attack_relearn import relearn
from loraprune.attack_samples import sample
from loraprune.attack_weights import quantise
from loraprune.attack_wording import rephrase
from loraprune.attacked import AttackedModel, AttackResult, AttackRows, Role, split_halves
from loraprune.evaluation import evaluate_files
from loraprune.metrics import retention
from loraprune.model import load_model, parameter_count
from loraprune.progress import show_nothing
from loraprune.quantised import QUANTISED
from loraprune.settings import Settings

EVALUATION: Values = {"rouge_rows": 0, "gradient_norm": False}
CACHED: Values = {"cache": str(CACHE / "evaluations")}  # apart, for a path does not decide what a mark is
MEMBERSHIP = ("loss", "zlib", "min_k", "min_k_plus_plus")  # of privacy, as in the source
FORGOTTEN = ("performance", "extraction_strength", "truth_ratio")  # of memorisation
WITHHELD, TAUGHT = "final", "taught"
RELEARNING: Values = {"weights": "all"}
ATTACKS: Values = {"attack_samples": 64, "attack_rows": 64}  # with rewording 12 processor seconds a cell of the demo
SAMPLED = ("contains", "rouge_l_recall")  # of the best answer: does it hold the facts, how much of the right one
REWORDED = ("performance", "extraction_strength")  # under the worst form for each fact
PREFILL: Values = {"tokens": 2048, "rounds": 31}
GPU_PREFILL = 16  # times as many tokens on a GPU, which needs as many before matrices outweigh calls
GPU_ROWS = 256  # in one pass of a mark on a GPU: 4,096 drawn answers are 16 batches there, not 64
CONFIDENCE = 0.95
NO_TRIM, NO_MAPS = -1, -4  # of glibc's mallopt: M_TRIM_THRESHOLD, M_MMAP_MAX


def marks_key(settings: Settings) -> str:
    """Return a hash of what decides which marks there are and how they are taken; not of the code."""
    said = [EVALUATION, MEMBERSHIP, FORGOTTEN, RELEARNING, list(QUANTISED), ATTACKS, SAMPLED, REWORDED, PREFILL]
    said += [GPU_PREFILL, GPU_ROWS] if settings.device == "cuda" else []
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]


def measure_marks(world: World, model: str, role: Role = "unlearned") -> Values:
    """Return everything that is measured of a checkpoint: by evaluation, and under the attacks."""
    settings = world.settings
    known = _evaluated(replace(settings, model=model, retain=settings.final_rows))
    taught = _evaluated(Settings(model=model, retain=settings.retain, **_machine(settings)))
    membership, forget = known["model"]["membership"], known["forget"]
    sets = {WITHHELD: known["retain"], TAUGHT: taught["retain"]}
    sets |= {name: known[name] for name in ("bystander", "holdout", "guard") if name in known}
    loaded = load_model(model, settings)
    return {
        "performance": forget["performance"],
        "exact_match": forget["exact_match"],
        "extraction_strength": forget["metrics"]["extraction_strength"]["value"],
        "truth_ratio": forget["metrics"]["truth_ratio"]["value"],
        "forget_quality": known["model"]["forget_quality"]["value"],
        "membership": {name: membership[name]["value"] for name in MEMBERSHIP},
        "sets": {name: {part: one[part] for part in ("performance", "loss")} for name, one in sets.items()},
        "parameters": parameter_count(loaded),
        **({"prefill": prefill_gain(loaded, load_model(settings.model, settings))} if role == "unlearned" else {}),
        **_attacked(world, model, role),
    }


def prefill_gain(model: Any, original: Any) -> float:
    """Return how many times faster than the original a model reads a prompt: above 1, it is faster.

    The two take turns in one process; median over the rounds' own ratios of processor seconds, which leave out the
    waiting for a core that other work holds: by the clock, a model against itself gave 0.85 to 1.30. On a GPU it is
    the clock, after everything asked of the GPU is done; other cells on the same card do disturb it. The prompt's rows
    are as long as the model's positions allow, and as many as make PREFILL's tokens: on one short row of a model this
    small, calls would weigh more than matrices, and a cut would not show.
    """
    keep_memory()
    on_gpu = original.device.type == "cuda"
    tokens = PREFILL["tokens"] * (GPU_PREFILL if on_gpu else 1)
    length = min(original.config.max_position_embeddings, tokens)
    shape = (tokens // length, length)
    prompt = torch.randint(original.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    models, clock = {"original": original, "this": model}, _gpu_clock if on_gpu else process_time
    return ratio(prefill_seconds(models, prompt.to(original.device), PREFILL["rounds"], clock), "original", "this")


def keep_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc: else it may hand it back and take
    it again at every pass, and pages are timed in place of matrices. Which model pays for that is chance: one and the
    same cut read a prompt 1.13 or 1.35 times as fast for it. What is measured after it in this process keeps it too.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(NO_TRIM, 2**31 - 1)
        libc.mallopt(NO_MAPS, 0)


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return perf_counter()


def _machine(settings: Settings) -> Values:
    return {name: getattr(settings, name) for name in ("dtype", "device", "max_length", "template")}


def _evaluated(settings: Settings) -> Values:
    how: Values = {**EVALUATION, **CACHED, **_passes(settings)}
    return evaluate_files(replace(settings, floor_rows=None, final_rows=None, **how))


def _passes(settings: Settings) -> Values:
    """Return how many rows go through a model at once: on a GPU as many as keep it busy."""
    return {"evaluate_batch_size": GPU_ROWS} if settings.device == "cuda" else {}


def _attacked(world: World, model: str, role: Role) -> Values:
    rows = world.inputs.rows
    shown, hidden = split_halves(rows["forget"], world.seed)
    settings = replace(world.settings, **ATTACKS, **_passes(world.settings))
    attacked = AttackedModel.of(role, model, settings, AttackRows(rows["forget"], rows["taught"], shown, hidden))
    relearnt = relearn(attacked, show_nothing, **RELEARNING)
    rounded = {name: quantise(attacked, show_nothing, name).readings["performance"] for name in QUANTISED}
    return {
        "relearning": {
            "area": fmean(relearnt.readings["performance"].area or ()),
            "highest": fmean(relearnt.readings["performance"].after),
            "curve": [[one["step"], one["performance"]] for one in relearnt.details["curve"]],
        },
        "rounded": {name: fmean(one.after) for name, one in rounded.items()},
        "sampled": _after(sample(attacked, show_nothing), SAMPLED),
        "reworded": _after(rephrase(attacked, show_nothing), REWORDED),
    }


def _after(result: AttackResult, names: Sequence[str]) -> dict[str, float]:
    """Return what an attack got: the means of these readings after it."""
    return {name: fmean(result.readings[name].after) for name in names}


# --- what marks are worth ---------------------------------------------------------------------------------------------


def closeness(value: float, reference: float) -> float:
    """Return 1 at the reference's value, 0 as far from it as a number in [0, 1] can be; both directions count."""
    return 1 - abs(value - reference) / max(reference, 1 - reference)


def judge(marks: Values, original: Values, reference: Values) -> Values:
    """Return one contestant's numbers on one seed: differences from the reference, what is kept, and the composites."""
    kept = _kept(marks, original)
    area, least = marks["relearning"]["area"], reference["relearning"]["area"]
    rise, least_rise = (one["area"] - one["curve"][0][1] for one in (marks["relearning"], reference["relearning"]))
    parts = {
        "memorisation": harmonic_mean(closeness(marks[name], reference[name]) for name in FORGOTTEN),
        "privacy": harmonic_mean(
            closeness(marks["membership"][name], reference["membership"][name]) for name in MEMBERSHIP
        ),
        "utility": harmonic_mean(min(1.0, one) for one in kept.values()),
    }
    resistance = 1 - max(0.0, area - least) / (1 - least)
    return {
        "forget": marks["performance"],
        **{f"{name}_gap": marks[name] - reference[name] for name in FORGOTTEN},
        "forget_quality": marks["forget_quality"],
        "kept": kept,
        "auc_gap": marks["membership"]["min_k"] - reference["membership"]["min_k"],
        "relearning_gap": area - least,
        "relearning_rise_gap": rise - least_rise,
        "rounded_gap": {name: one - marks["performance"] for name, one in marks["rounded"].items()},
        **{f"{name}_gap": _differences(marks[name], reference[name]) for name in ("sampled", "reworded")},
        "left": marks["parameters"] / original["parameters"],
        "prefill": marks["prefill"],
        **parts,
        "resistance": resistance,
        "composite": harmonic_mean(parts.values()),
        "composite_relearning": harmonic_mean([*parts.values(), resistance]),
    }


def _kept(marks: Values, original: Values) -> dict[str, float]:
    """Return retention on every set that was to be kept; of the guard, the original's loss over the loss now."""
    ours, theirs = marks["sets"], original["sets"]
    names = [name for name in (WITHHELD, TAUGHT, "bystander") if name in ours]
    kept = {name: retention(theirs[name]["performance"], ours[name]["performance"]) for name in names}
    return kept | ({"guard": theirs["guard"]["loss"] / ours["guard"]["loss"]} if "guard" in ours else {})


def _differences(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {name: one - theirs[name] for name, one in ours.items()}


def harmonic_mean(values: Iterable[float]) -> float:
    """Return the harmonic mean, 0 where one value is."""
    return float(hmean([max(0.0, one) for one in values]))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Return ours minus theirs, seed by seed, over the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def half_width(values: Sequence[float]) -> float | None:
    """Return half of the 95% interval of Student's t around the mean of a number a seed; None of a single seed."""
    if len(values) < 2:
        return None
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * stdev(values) / sqrt(len(values))
