"""Evaluation's speed: what do all teacher-forced metrics of a set cost beside the bare forward passes over it?

Reads    nothing: models of random weights, rows of random words
Gives    bench/results/evaluate_speed.json and the section of docs/results.md
Source   -
Symbols  bare = the model's own forward passes over the same batches, in eval mode without gradients or cache
"""

import argparse
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import psutil
import torch
from results_page import markdown_table, write_results
from tofu import RECIPE
from transformers import LlamaConfig, LlamaForCausalLM

from loraprune.answers import answers_only, silent
from loraprune.data import NO_LABEL, Example, Row, batches_by_length, collate, encode, find_facts
from loraprune.interval import mean_interval
from loraprune.objectives import logits_of
from loraprune.row_scores import TEACHER_FORCED, teacher_forced
from loraprune.scratch import train_tokenizer

ALLOWED = 1.3  # times the bare passes
BATCH_SIZE = 32
WARM = 2  # batches that are run once before any is counted


@dataclass(frozen=True)
class Case:
    """A model's size, by LlamaConfig's names."""

    text: str
    sizes: Mapping[str, int]


CASES = {
    "middle": Case(
        "12 layers, hidden 640, vocabulary 32,000",
        {
            "vocab_size": 32_000,
            "hidden_size": 640,
            "intermediate_size": 1728,
            "num_hidden_layers": 12,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
        },
    ),
    "tofu": Case("the TOFU bench's model", {"vocab_size": RECIPE.vocabulary, **RECIPE.sizes}),
}
PASSES = {
    "bare": "bare forward passes",
    "answers": "the same, logits where answers are alone",
    "metrics": "all teacher-forced metrics",
    "intervals": "their 95% intervals",
}


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--quick", action="store_true", help="96 rows, printed, nothing written")
    options = parser.parse_args()
    count = 96 if options.quick else options.rows
    results = {name: measure(CASES[name], count) for name in options.cases}
    print(section(results))
    if not options.quick:
        write_results("evaluate_speed", results, section(results))


def measure(case: Case, count: int) -> dict[str, Any]:
    """Return the seconds of each kind of pass over the same batches, taken in turns, batch by batch."""
    rows = make_rows(count)
    tokenizer: Any = train_tokenizer([row.text for row in rows], min(case.sizes["vocab_size"], 8000))
    examples, model = encode(rows, tokenizer, name="data"), make_model(case.sizes)
    batches = [[examples[row] for row in part] for part in batches_by_length(examples, BATCH_SIZE)]
    columns: dict[str, list[float]] = {name: [] for name in (*TEACHER_FORCED, "zlib")}

    def metrics(batch: Sequence[Example]) -> None:
        labels = [[label for label in one.labels if label != NO_LABEL] for one in batch]
        texts = [tokenizer.decode(one, skip_special_tokens=True) for one in labels]
        options = {"batch_size": len(batch), "pad_token_id": tokenizer.pad_token_id}
        found = teacher_forced(model, batch, texts, silent, options)
        for name, values in columns.items():
            values.extend(found[name])

    kinds: dict[str, Callable[[Sequence[Example]], object]] = {
        "bare": lambda batch: bare(model, batch, tokenizer.pad_token_id),
        "answers": lambda batch: bare(model, batch, tokenizer.pad_token_id, answers_alone=True),
        "metrics": metrics,
    }
    seconds = in_turns(kinds, batches)
    seconds["intervals"] = [timed(lambda: [mean_interval(one[-count:], find_facts(rows)) for one in columns.values()])]
    return summary(case, seconds, examples, sum(one.numel() for one in model.parameters()))


def in_turns(
    kinds: Mapping[str, Callable[[Sequence[Example]], object]], batches: Sequence[Sequence[Example]]
) -> dict[str, list[float]]:
    """Return each kind's seconds a batch; another kind is first each time, so that what disturbs one disturbs all."""
    for batch in batches[-WARM:]:
        for run in kinds.values():
            run(batch)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number, batch in enumerate(batches):
        order = list(kinds)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            seconds[name].append(timed(lambda run=kinds[name], batch=batch: run(batch)))
    return seconds


@torch.no_grad()
def bare(model: Any, examples: Sequence[Example], pad: int, *, answers_alone: bool = False) -> None:
    batch = collate(examples, pad)
    if not answers_alone:
        logits_of(model, batch)
        return
    with answers_only(model, batch["labels"][:, 1:] != NO_LABEL):
        logits_of(model, batch)


def timed(action: Callable[[], object]) -> float:
    begun = perf_counter()
    action()
    return perf_counter() - begun


def make_rows(count: int) -> list[Row]:
    """Return questions of about 20 tokens and answers of about 40, of random words, as TOFU's rows have."""
    source = random.Random(0)
    syllables = [start + vowel for start in (*"bdfgklmnprstvz", "br", "tr", "st") for vowel in "aeiou"]
    words = ["".join(source.choices(syllables, k=source.randint(1, 4))) for _ in range(3000)]

    def text(least: int, most: int) -> str:
        return " ".join(source.choices(words, k=source.randint(least, most)))

    return [Row(number, (("user", text(6, 14)),), text(10, 38)) for number in range(1, count + 1)]


def make_model(sizes: Mapping[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config: Any = LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # pyright: ignore
    return LlamaForCausalLM(config).eval()


def summary(
    case: Case, seconds: Mapping[str, Sequence[float]], examples: Sequence[Example], parameters: int
) -> dict[str, Any]:
    """Return sums, their ratios to the bare passes, and the middle of the batches' own ratios."""
    sums = {name: sum(one) for name, one in seconds.items()}
    pairs = zip(seconds["metrics"], seconds["bare"], strict=True)
    return {
        "text": case.text,
        "parameters": parameters,
        "rows": len(examples),
        "tokens": sum(len(one.input_ids) for one in examples),
        "answer_tokens": sum(label != NO_LABEL for one in examples for label in one.labels),
        "batch_size": BATCH_SIZE,
        "threads": torch.get_num_threads(),
        "seconds": {name: round(one, 4) for name, one in sums.items()},
        "ratio": round(sums["metrics"] / sums["bare"], 4),
        "ratio_with_intervals": round((sums["metrics"] + sums["intervals"]) / sums["bare"], 4),
        "ratio_to_answers_alone": round(sums["metrics"] / sums["answers"], 4),
        "median_ratio": round(statistics.median(one / other for one, other in pairs), 4),
    }


def section(results: Mapping[str, Any]) -> str:
    """Return the section of the results page."""
    header = ("model", "rows", "tokens (of answers)", "pass", "seconds", "to the bare passes")
    rows = []
    for one in results.values():
        for name, words in PASSES.items():
            first = name == "bare"
            rows.append(
                [
                    f"{one['text']}: {one['parameters'] / 1e6:.1f} M parameters" if first else "",
                    f"{one['rows']:,}" if first else "",
                    f"{one['tokens']:,} ({one['answer_tokens']:,})" if first else "",
                    words,
                    f"{one['seconds'][name]:.2f}",
                    f"{one['seconds'][name] / one['seconds']['bare']:.3f}",
                ]
            )
    told = "; ".join(
        f"{one['text']}: {one['ratio']:.2f} of the bare passes ({one['ratio_with_intervals']:.2f} with intervals; "
        f"{one['ratio_to_answers_alone']:.2f} of passes that compute logits for answers alone)"
        for one in results.values()
    )
    held = all(one["ratio_with_intervals"] <= ALLOWED for one in results.values())
    threads = next(iter(results.values()))["threads"]
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"{told}. At most {ALLOWED} times the bare passes: {'yes' if held else 'no'}. Metrics: probability, loss, "
            "exact match, fact performance, exact memorization, extraction strength, min-k, min-k++ and zlib of every "
            "row, the answers' decoding included; they compute logits where answers are alone, bare passes everywhere, "
            f"as the model does by itself. Batches of {BATCH_SIZE} by length, float32, {threads} thread(s) on "
            f"{psutil.cpu_count()} cores, the passes taken in turns batch by batch. Made by "
            "`python bench/evaluate_speed.py`.",
        ]
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
