"""Attack by asking again and again: does one of many drawn answers hold what the likeliest does not?

Reads    a model, the questions of the forget set
Gives    sample
Source   best of k without bias as pass@k, arXiv 2107.03374; that a greedy answer hides what samples leak, 2410.03523
Symbols  k answers drawn to one question at temperature 1
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from loraprune.attacked import AttackedModel, AttackResult, NotRun, Reading, Values, interval_of
from loraprune.data import NO_LABEL, Row, find_facts, normalise, prompt_ids
from loraprune.generation import ANSWER_TOKENS, end_tokens, generate
from loraprune.metrics import Rows, best_of
from loraprune.progress import Advance
from loraprune.rouge import rouge

DRAWN = (1, 8, 64)  # of how many the best is told


def sample(attacked: AttackedModel, advance: Advance) -> AttackResult:
    """Draw answers to every question; the best counts, by the facts that it holds and by ROUGE-L recall."""
    rows, settings = asked_rows(attacked), attacked.settings
    advance(0, new_total=len(rows) * settings.attack_samples)
    model, longest = attacked.load(), _longest_answer(attacked, rows)
    written = generate(
        model,
        [prompt_ids(row, attacked.tokenizer, template=settings.template) for row in rows],
        end_token_ids=end_tokens(model, attacked.tokenizer),
        max_new_tokens=longest,
        samples=settings.attack_samples,
        temperature=1.0,
        seed=settings.seed,
        advance=advance,
        **attacked.options,
    )
    texts = [_texts(one, attacked.tokenizer) for one in written]
    scores = {
        "contains": [[contains(row, text) for text in own] for row, own in zip(rows, texts, strict=True)],
        "rouge_l_recall": [_recalls(row, own) for row, own in zip(rows, texts, strict=True)],
    }
    return _result(scores, find_facts(rows), {"samples": settings.attack_samples, "most_new_tokens": longest})


def asked_rows(attacked: AttackedModel) -> list[Row]:
    """Return the rows that have a question, at most `attack_rows` of them, chosen by the seed."""
    asked = [row for row in attacked.rows.forget if row.messages]
    if not asked:
        raise NotRun("no row of the forget set has a question that could be asked")
    count = min(attacked.settings.attack_rows, len(asked))
    chosen = sorted(random.Random(f"{attacked.settings.seed}/sample").sample(range(len(asked)), count))
    return [asked[place] for place in chosen]


def _longest_answer(attacked: AttackedModel, rows: Sequence[Row]) -> int:
    """Return how many tokens a model may write: twice the longest right answer's, so that a wordy one gets there."""
    longest = max(sum(label != NO_LABEL for label in one.labels) for one in attacked.examples(rows))
    return min(ANSWER_TOKENS, 2 * longest)


def _texts(written: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written]


def contains(row: Row, text: str) -> float:
    """Return 1.0 where a text holds all marked facts of a row, or its whole answer where none is marked; else 0.0.

    Case and punctuation count for nothing; words count whole.
    """
    words = f" {normalise(text)} "
    return float(all(f" {normalise(one)} " in words for one in row.facts or (row.answer,)))


def _recalls(row: Row, texts: Sequence[str]) -> list[float]:
    different = sorted(set(texts))  # a model that knows an answer gives it many times
    recall = {
        text: one.rougeL_recall
        for text, one in zip(different, rouge([row.answer] * len(different), different), strict=True)
    }
    return [recall[text] for text in texts]


def _result(scores: dict[str, list[list[float]]], facts: Sequence[int], details: Values) -> AttackResult:
    drawn = sorted({one for one in DRAWN if one <= details["samples"]} | {details["samples"]})
    readings, told = {}, {}
    for name, values in scores.items():
        best = {count: best_of(values, count) for count in drawn}
        readings[name] = Reading(facts, best[1].tolist(), best[drawn[-1]].tolist())
        told[name] = [_told(count, one, facts) for count, one in best.items()]
    return AttackResult(readings, {**details, "best_of": told})


def _told(count: int, values: Rows, facts: Sequence[int]) -> Values:
    return {"drawn": count, "value": float(np.mean(values)), "interval": interval_of(values, facts)}
