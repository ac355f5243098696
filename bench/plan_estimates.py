"""Plan's estimates against runs: is the memory and time that `loraprune plan` foretells what `unlearn` then takes?

Reads    the demo's model where bench/demo_seeds.py left it in bench/cache, else one of its size with random weights
Gives    bench/results/plan_estimates.json and the section of docs/results.md
Source   -
Symbols  MiB = 2**20 bytes; resident = what the operating system says that the process holds
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from results_page import ROOT, markdown_table, write_results

from loraprune.demo import RECIPE
from loraprune.scratch import make_llama, train_tokenizer

CACHE = ROOT / "bench" / "cache"
FOLDER = CACHE / "plan_estimates"
STAGES = ("evaluate before", "train", "score", "export", "evaluate after")
ALLOWED = 0.25  # part by which an estimate of memory may miss
EVERY = 0.005  # seconds between two samples

MIDDLE = {
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
}
FEW_STEPS = {
    "device": "cpu",
    "min-retain-performance": 0,
    "warmup-steps": 2,
    "prune-every": 1,
    "prune-rounds": 2,
    "finish-steps": 2,
    "evaluate-every": 1,
    "recovery-steps": 1,
    "minimum-forget-sensitivity": 0,
    "unlearning-threshold": 0.1,
    "sparsity": 0.1,
}


@dataclass(frozen=True)
class Case:
    """A model of random weights, or the demo's, its rows and the settings that differ from FEW_STEPS."""

    text: str
    sizes: Mapping[str, int] = field(default_factory=lambda: MIDDLE)
    dtype: torch.dtype = torch.float32
    vocabulary: int = 8192
    words: int = 50  # a row, at most
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # where model and sets are already


def batches(train: int, evaluate: int) -> dict[str, int]:
    sizes = {"forget-batch-size": train, "retain-batch-size": train, "evaluate-batch-size": evaluate}
    return {**sizes, "score-rows": evaluate}


CASES = {
    "demo": Case(
        "the demo's model, its rows, default batches (32 + 32, 64)",
        RECIPE.sizes,
        vocabulary=RECIPE.vocabulary,
        words=14,
        folder=CACHE / "demo" / "seed-0",
    ),
    "float32": Case("60 M parameters, float32, batches 4 + 4, 8", settings=batches(4, 8)),
    "bfloat16": Case("the same in bfloat16", dtype=torch.bfloat16, settings=batches(4, 8)),
    "batches": Case("the same in float32, batches 12 + 12, 24", settings=batches(12, 24)),
}


def main() -> None:
    """Plan and run every case and write the table."""
    results = {name: measure(name, case) for name, case in CASES.items()}
    write_results("plan_estimates", results, section(results), mark="plan")


def measure(name: str, case: Case) -> dict[str, Any]:
    """Return a case's estimates beside what its run took."""
    inputs = case.folder if case.folder is not None and (case.folder / "untouched").exists() else make(name, case)
    output = FOLDER / f"{name}-run"
    shutil.rmtree(output, ignore_errors=True)
    flags = [
        str(inputs / "untouched"),
        "--forget",
        str(inputs / "forget.jsonl"),
        "--retain",
        str(inputs / "retain.jsonl"),
    ]
    for flag, value in {**FEW_STEPS, **case.settings}.items():
        flags += [f"--{flag}", str(value)]
    planned = subprocess.run([*program("plan"), *flags, "--json"], stdout=subprocess.PIPE, check=True)
    plan = json.loads(planned.stdout)
    stages, seconds = watch([*program("unlearn"), *flags, "--output", str(output)], output)
    shutil.rmtree(output)
    memory = {one["stage"]: one for one in plan["memory"]["stages"]}
    times = {one["stage"]: one["seconds"] for one in plan["time"]["stages"]}
    return {
        "text": case.text,
        "parameters": plan["groups"]["total_parameters"],
        "process": plan["memory"]["process"],
        "allocator": plan["memory"]["allocator"],
        "stages": {
            stage: {
                "needed": memory[stage]["needed"],
                "estimated": memory[stage]["resident"],
                "measured": stages[stage],
                "estimated_seconds": times[stage],
                "measured_seconds": seconds[stage],
            }
            for stage in STAGES
        },
    }


def program(command: str) -> list[str]:
    return [sys.executable, "-m", "loraprune", command]


def make(name: str, case: Case) -> Path:
    """Return a folder with a model of random weights and two sets of random words."""
    folder, source = FOLDER / name, random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    syllables = [start + vowel for start in (*"bdfgklmnprstvz", "br", "tr", "st") for vowel in "aeiou"]
    words = ["".join(source.choices(syllables, k=source.randint(1, 4))) for _ in range(9000)]

    def text(least: int, most: int) -> str:
        return " ".join(source.choices(words, k=source.randint(least, most)))

    tokenizer = train_tokenizer([text(200, 200) for _ in range(400)], case.vocabulary)
    for part, count in (("forget", 36), ("retain", 80)):
        question, answer = case.words // 3, case.words * 2 // 3
        rows = [{"question": text(question // 2, question), "answer": text(answer // 2, answer)} for _ in range(count)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    make_llama(tokenizer, 0, **case.sizes).to(case.dtype).save_pretrained(folder / "untouched")
    tokenizer.save_pretrained(folder / "untouched")
    return folder


@dataclass
class Watched:
    """What is seen from outside of a running process."""

    samples: list[tuple[float, int]] = field(default_factory=list)  # seconds since its start, resident bytes
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    exported: float | None = None


def watch(command: list[str], output: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Run a command; return the most bytes it held in each stage, and each stage's seconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen, begun, told = Watched(), time.monotonic(), 0
    lines: dict[bytes, float] = {}  # when each was first there; a run may write its file anew
    held, events, model = psutil.Process(process.pid), output / "events.jsonl", output / "model"
    while process.poll() is None:
        now = time.monotonic() - begun
        seen.samples.append((now, _resident(held)))
        if events.exists() and events.stat().st_size != told:
            text = events.read_bytes()
            told = len(text)
            for line in text[: text.rfind(b"\n") + 1].splitlines():
                lines.setdefault(line, now)
        if seen.exported is None and model.exists():
            seen.exported = now
        time.sleep(EVERY)
    if process.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    seen.events = [(when, json.loads(line)) for line, when in lines.items()]
    return by_stage(seen)


def _resident(held: psutil.Process) -> int:
    try:
        return held.memory_info().rss
    except psutil.NoSuchProcess:  # it ended between two looks
        return 0


def by_stage(seen: Watched) -> tuple[dict[str, int], dict[str, float]]:
    """Return peaks and seconds by stage: an event stands at a stage's end, a score's at that of the look after it."""
    ends = [when for when, one in seen.events if one["event"] == "stage" and one["name"] == "evaluate"]
    trained = next(when for when, one in seen.events if one["event"] == "stage" and one["name"] == "train")
    looked = [(when - one["look_duration"], one["duration"]) for when, one in seen.events if one["event"] == "score"]
    scored = [(end - duration, end) for end, duration in looked]
    assert seen.exported is not None
    spans = {
        "evaluate before": [(0.0, ends[0])],
        "score": scored,
        "train": [(ends[0], trained)],
        "export": [(trained, seen.exported)],
        "evaluate after": [(seen.exported, ends[-1])],
    }
    seconds = {stage: sum(end - start for start, end in one) for stage, one in spans.items()}
    seconds["train"] -= seconds["score"]
    first = next(one["duration"] for _, one in seen.events if one["event"] == "stage" and one["name"] == "evaluate")
    seconds["evaluate before"] = first  # the process's own start is not the stage's
    peaks = {stage: max(_inside(seen, one, scored if stage == "train" else [])) for stage, one in spans.items()}
    return peaks, seconds


def _inside(seen: Watched, spans: list[tuple[float, float]], aside: list[tuple[float, float]]) -> list[int]:
    """Return the samples in some spans and not in others."""

    def within(when: float, those: list[tuple[float, float]]) -> bool:
        return any(start <= when <= end for start, end in those)

    return [size for when, size in seen.samples if within(when, spans) and not within(when, aside)]


def section(results: Mapping[str, Any]) -> str:
    """Return the section of the results page."""
    header = ("case", "stage", "needed MiB", "estimated MiB", "measured MiB", "off", "estimated s", "measured s")
    rows, worst = [], 0.0
    for one in results.values():
        for stage, numbers in one["stages"].items():
            off = numbers["estimated"] / numbers["measured"] - 1
            worst = max(worst, abs(off))
            rows.append(
                [
                    one["text"] if stage == STAGES[0] else "",
                    stage,
                    *(f"{numbers[key] / 2**20:,.0f}" for key in ("needed", "estimated", "measured")),
                    f"{off:+.0%}{'' if abs(off) <= ALLOWED else ' (!)'}",
                    *(f"{numbers[key]:.1f}" for key in ("estimated_seconds", "measured_seconds")),
                ]
            )
    missed = sum(row[5].endswith("(!)") for row in rows)
    verdict = "none" if missed == 0 else f"{missed} of {len(rows)}"
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"Off by more than {ALLOWED:.0%}: {verdict}; the worst is off by {worst:.0%}. Measured: the most bytes "
            f"resident in a fresh process, sampled every {EVERY * 1000:.0f} ms from outside, one thread, "
            f"{psutil.cpu_count()} cores that other work shared. Made by `python bench/plan_estimates.py`.",
        ]
    )


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
