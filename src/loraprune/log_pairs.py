"""Log pairs: are two evaluation logs of the same rows, read by the same tokenizer? Refused by metric and row if not.

Reads    two EvaluationLog
Gives    check_pair, check_tokens
Source   -
Symbols  t answer tokens of a row, without the end; b bytes of its answer
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NoReturn

from loraprune.errors import UserError
from loraprune.evaluation_log import EvaluationLog, LogRow, Table, refuse_other_rows

DATE = re.compile(r"Today Date: [^\n]*")  # what Llama 3's chat template writes in front of every prompt
MEMORIZED = ("forget_Q_A_ROUGE", "forget_verbmem_ROUGE")  # hold the answers that shares of right tokens are of
NO_LETTER = re.compile(r"[\W_]+")
SPARE_TOKENS = 8  # of an answer, beyond one a byte: spaces, line ends
SHORTEST_OPENING = 4  # letters of what opens a question in a chat template, such as "user"
LONGEST = 4096  # tokens of an answer that could be read off a share at all


def check_pair(log: EvaluationLog, reference: EvaluationLog) -> str | None:
    """Raise UserError where the two logs are of different schema, split or tokenizer; the row is named, never quoted.

    Seen are: other rows; other questions or answers, where the log holds them; other chat templates; other numbers of
    tokens, which the first TOFU code writes and which open-unlearning's shares of right tokens betray. Not seen is a
    difference in what a log neither holds nor counts, such as the questions of a membership attack. Returns what a
    reader should know of a pair that goes together otherwise, or None.
    """
    if log.schema != reference.schema:
        _refuse(log, reference, "the one is of open-unlearning's schema, the other of the first TOFU code's", SCHEMA)
    shared = [name for name in log.tables if name in reference.tables]
    notes: list[str | None] = []
    for name in shared:
        ours, theirs = log.tables[name], reference.tables[name]
        refuse_other_rows(ours, theirs, f"{name} of {log.path}", f"{name} of {reference.path}")
        notes.append(_compare_texts(log, reference, name))
    _compare_token_counts(log, reference, shared)
    if log.schema == "open-unlearning":
        _compare_shares(log, reference)
        _compare_compressed(log, reference)
    return next(filter(None, notes), None)


SPLIT = "the two models were asked different rows, and a comparison of their numbers means nothing."
TOKENS = "the same answer has other tokens for each, so their means over tokens cannot be compared."
SCHEMA = "the two codes ask with other prompts and average otherwise, so their rows cannot be compared."


def _refuse(log: EvaluationLog, reference: EvaluationLog, what: str, why: str) -> NoReturn:
    fix = "give a --reference-log made by the same code, on the same split, with the same tokenizer and chat template."
    raise UserError(f"{log.path} and {reference.path} do not go together: {what}.", why, fix)


def _compare_texts(log: EvaluationLog, reference: EvaluationLog, name: str) -> str | None:
    ours, theirs = log.tables[name], reference.tables[name]
    if row := _first_other(_texts(ours, _answer), _texts(theirs, _answer)):
        _refuse(log, reference, f"row {row} of {name} has another answer; it is another split", SPLIT)
    questions = _texts(ours, _question), _texts(theirs, _question)
    row, note = _first_other(*questions), None
    if row and len(ours) > 1 and all(questions[0][one] != questions[1].get(one) for one in questions[0]):
        frames = [_frame(one) for one in questions]
        row = _first_other(*(_bare(one, *frame) for one, frame in zip(questions, frames, strict=True)))
        if row is None and not _same_template(*frames):
            what = f"row {next(iter(ours))} of {name} frames the same question otherwise"
            _refuse(log, reference, f"{what}; it is another tokenizer or chat template", TOKENS)
        note = "the two logs' questions stand after another system prompt"
    if row:
        _refuse(log, reference, f"row {row} of {name} has another question; it is another split", SPLIT)
    return note


def _first_other(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    return next((row for row in ours if row in theirs and ours[row] != theirs[row]), None)


def _question(row: LogRow) -> Any:
    return row["generated_text"][0] if _has_texts(row) else row.get("input")


def _answer(row: LogRow) -> Any:
    return row["generated_text"][2] if _has_texts(row) else row.get("ground_truth")


def _has_texts(row: LogRow) -> bool:
    return isinstance(row.get("generated_text"), list) and len(row["generated_text"]) == 3


def _texts(table: Table, read: Callable[[LogRow], Any]) -> dict[str, str]:
    """Return the rows' texts, letters and digits alone: decoding sets spaces and hyphens as the tokenizer likes."""
    found = {row: read(one) for row, one in table.items()}
    return {row: NO_LETTER.sub("", DATE.sub("", text)) for row, text in found.items() if isinstance(text, str)}


def _frame(texts: Mapping[str, str]) -> tuple[str, str]:
    """Return what all texts begin and end with: a chat template's words, mostly."""
    any_text = next(iter(texts.values()))
    begin = _common_length(list(texts.values()))
    end = _common_length([text[begin:][::-1] for text in texts.values()])
    return any_text[:begin], any_text[len(any_text) - end :]


def _bare(texts: Mapping[str, str], opening: str, closing: str) -> dict[str, str]:
    return {row: text[len(opening) : len(text) - len(closing)] for row, text in texts.items()}


def _same_template(ours: tuple[str, str], theirs: tuple[str, str]) -> bool:
    """Return whether two frames close alike and open the question alike: what stands before is a system prompt."""
    nearest = _common_length([ours[0][::-1], theirs[0][::-1]])
    return ours[1] == theirs[1] and nearest >= min(SHORTEST_OPENING, len(ours[0]), len(theirs[0]))


def _common_length(texts: Sequence[str]) -> int:
    """Return how many characters all texts begin with; first and last in order share no more than all do."""
    pairs = zip(min(texts), max(texts), strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(map(len, texts)))


def _compare_token_counts(log: EvaluationLog, reference: EvaluationLog, shared: Sequence[str]) -> None:
    for name in shared:
        for row, ours in log.tables[name].items():
            theirs = reference.tables[name][row]
            columns = [column for column in ours if column.startswith("num_token") and column in theirs]
            if other := next((column for column in columns if ours[column] != theirs[column]), None):
                what = f"row {row} of {name} has other numbers of tokens in {other}; it is another tokenizer"
                _refuse(log, reference, what, TOKENS)


def _compare_shares(log: EvaluationLog, reference: EvaluationLog) -> None:
    """Refuse two logs whose shares of right tokens are not of one number of tokens.

    Exact memorization and extraction strength are both whole numbers over t. All four must be for one t, and an
    answer has no more tokens than bytes; where none is that small, the two models read the answer in other tokens.
    """
    texts = next((log.tables[name] for name in MEMORIZED if name in log.tables), {})
    for row, one in texts.items():
        tokens = math.lcm(*(share.denominator for share in (*_shares(log, row), *_shares(reference, row))))
        if tokens > len(str(_answer(one)).encode()) + SPARE_TOKENS:
            what = f"row {row} of extraction_strength counts other numbers of tokens; it is another tokenizer"
            _refuse(log, reference, what, TOKENS)


def check_tokens(reference: EvaluationLog, tokens: Sequence[int]) -> None:
    """Raise UserError where a reference's shares cannot be of these numbers of answer tokens, the ends left out."""
    for row, count in enumerate(tokens):
        if any(count % share.denominator for share in _shares(reference, str(row))):
            raise UserError(
                f"row {row} of extraction_strength of {reference.path} is no share of this model's {count} tokens.",
                "the reference read the answer in other tokens, so means over tokens cannot be compared.",
                "give a --reference-log made with this model's tokenizer, or leave it out.",
            )


def _shares(log: EvaluationLog, row: str) -> list[Fraction]:
    """Return a row's shares of right tokens as fractions; what cannot be one is left out."""
    scores = [
        log.tables.get(name, {}).get(row, {}).get("score") for name in ("exact_memorization", "extraction_strength")
    ]
    return [Fraction(one).limit_denominator(LONGEST) for one in scores if one is not None and math.isfinite(one)]


def _compare_compressed(log: EvaluationLog, reference: EvaluationLog) -> None:
    """Refuse two logs whose attacked texts compress to other lengths: loss over zlib's score is that many bytes."""
    for side in ("forget", "holdout"):
        ours, theirs = (_compressed(one, side) for one in (log, reference))
        if row := next((row for row in ours if row in theirs and ours[row] != theirs[row]), None):
            what = f"row {row} of mia_zlib {side} is of a text of another length; it is another split"
            _refuse(log, reference, what, SPLIT)


def _compressed(log: EvaluationLog, side: str) -> dict[str, int]:
    losses, scores = (log.tables.get(f"mia_{name} {side}", {}) for name in ("loss", "zlib"))
    pairs = {row: (losses[row].get("score"), scores[row].get("score")) for row in losses if row in scores}
    return {row: round(loss / score) for row, (loss, score) in pairs.items() if score and math.isfinite(loss / score)}
