"""ROUGE: how much of an answer's wording stands in what a model wrote.

Reads    texts
Gives    Rouge, rouge
Source   Lin 2004, by the library rouge-score with its stemmer, as open-unlearning, TOFU and MUSE use it
Symbols  recall = share of the right answer's words (rouge1) or of their longest common subsequence (rougeL)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Rouge:
    """One pair of texts; all in [0, 1]."""

    rouge1_recall: float
    rouge1_f1: float
    rougeL_recall: float
    rougeL_f1: float


def rouge(answers: Sequence[str], written: Sequence[str]) -> list[Rouge]:
    """Return the scores of what was written against each right answer."""
    return [_pair(*pair) for pair in zip(answers, written, strict=True)]


def _pair(answer: str, written: str) -> Rouge:
    scores = _scorer().score(answer, written)
    one, longest = scores["rouge1"], scores["rougeL"]
    return Rouge(one.recall, one.fmeasure, longest.recall, longest.fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # loads nltk: not for those who leave ROUGE out

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
