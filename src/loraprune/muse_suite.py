"""MUSE suite: what a model still knows of news or books, how much of their wording it completes, whether it shows.

Reads    knowmem/forget_qa, forget_qa_icl, retain_qa, retain_qa_icl; verbmem/forget; privleak/forget, privleak/holdout
Gives    run_muse; writes MUSE_EVAL.json and MUSE_SUMMARY.json
Source   MUSE, arXiv 2407.06460; open-unlearning, arXiv 2506.12618, where the two differ
Symbols  icl = examples that stand in front of every question; gt = the text that follows a prompt
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprune.data import NO_LABEL, PLAIN_TEMPLATE, Example, encode, written_out
from loraprune.errors import UserError
from loraprune.evaluation_log import EvaluationLog
from loraprune.log_aggregates import Entry
from loraprune.log_writer import Content, scored
from loraprune.row_scores import EncodedSet, Subject, prompt_of
from loraprune.settings import Settings
from loraprune.sources import Row, load_rows
from loraprune.suite import (
    Rows,
    Source,
    asked,
    log_attacks,
    not_measured,
    refuse_reference,
    run_suite,
    tokens_of,
    written,
)

if TYPE_CHECKING:
    from loraprune.benchmark import Request

KNOWN = {"forget_knowmem": "knowmem/forget_qa", "retain_knowmem": "knowmem/retain_qa"}
WORDING = "verbmem/forget"
ATTACKED = {"forget": "privleak/forget", "holdout": "privleak/holdout"}
LONGEST = 2048  # tokens of a text, beyond its prompt
KNOWN_TOKENS, WORDING_TOKENS = 32, 128  # that the model may write
STOPS = ("\n\n", "\nQuestion", "Question:")  # a base model goes on with the next question
ROUGE = (*(f"{name}_ROUGE" for name in KNOWN), "forget_verbmem_ROUGE")


def run_muse(settings: Settings, request: "Request") -> dict[str, Entry]:
    """Return the suite's aggregates on the settings' model, having written its log; raises what `run_suite` does.

    Lengths are the suite's own.
    """
    _, found = run_suite("MUSE", settings, request, read_muse, measure_muse)
    return dict(sorted((found | not_measured(settings, ROUGE, None)).items()))


def read_muse(source: Source) -> Rows:
    """Return the suite's rows by file."""
    asked_files = [f"{file}{end}" for file in KNOWN.values() for end in ("", "_icl")]
    missing = [name for name in (*asked_files, WORDING, *ATTACKED.values()) if source.find(name) is None]
    if missing:
        raise UserError(
            f"{source.where} lacks {', '.join(f'{name}.json' for name in missing)}.",
            "the suite's numbers are of all its files.",
            "add them, in folders called knowmem, verbmem and privleak, or name another folder with --data.",
        )
    rows = {name: source.rows(name) for name in asked_files}
    rows[WORDING] = load_rows(source.path(WORDING), name=WORDING, columns={"prompt": "prompt", "answer": "gt"})
    return rows | {name: _plain_texts(source, name) for name in ATTACKED.values()}


def _plain_texts(source: Source, name: str) -> list[Row]:
    """Return texts: the benchmark's repository has them as a list of strings, its hub data set as a column."""
    path = Path(source.path(name))
    if path.suffix == ".json" and path.is_file():
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            texts = None  # JSON lines, or broken: `load_rows` tells
        if isinstance(texts, list) and texts and all(isinstance(one, str) and one.strip() for one in texts):
            return [Row(number, (), text) for number, text in enumerate(texts, 1)]
    return source.rows(name)


def measure_muse(subject: Subject, rows: Rows, reference: EvaluationLog | None) -> Content:
    """Return the rows' values of every metric of the suite under one model, in open-unlearning's schema."""
    wording = _wording(subject, rows[WORDING])
    texts = asked(subject, wording.rows, wording.examples)
    if reference is not None:
        refuse_reference(reference, "forget_verbmem_ROUGE", texts, tokens_of(wording))
    columns = subject.teacher_forced(wording)
    content: Content = {name: scored(columns[name]) for name in ("exact_memorization", "extraction_strength")}
    members, others = (_texts(subject, name, rows[file]) for name, file in ATTACKED.items())
    content |= {**log_attacks(subject, _reference(subject), members, others), "privleak": {}}
    if subject.settings.rouge_rows:
        prompts = [prompt_of(one) for one in wording.examples]
        content["forget_verbmem_ROUGE"] = written(subject, WORDING, prompts, texts, new_tokens=WORDING_TOKENS)
        content |= {f"{name}_ROUGE": _known(subject, rows, file) for name, file in KNOWN.items()}
    return content


def _reference(subject: Subject) -> Subject | None:
    settings = subject.settings
    return Subject(settings.reference, settings, subject.cache) if settings.reference else None


def _wording(subject: Subject, rows: Sequence[Row]) -> EncodedSet:
    """Return each prompt with the text that follows it after a space, and no end: the text goes on."""
    examples = [_continued(subject.tokenizer, row.prompt, row.answer) for row in rows]
    return EncodedSet(WORDING, rows, examples, range(len(rows)))


def _continued(tokenizer: Any, prompt: str, text: str) -> Example:
    opening = list(tokenizer(prompt)["input_ids"])
    if opening[-1:] == [tokenizer.eos_token_id]:
        opening.pop()
    first = max(len(opening), 1)
    tokens = list(tokenizer(f"{prompt} {text}")["input_ids"])[: first + LONGEST]
    return Example(tuple(tokens), (*[NO_LABEL] * first, *tokens[first:]), (False,) * len(tokens))


def _texts(subject: Subject, name: str, rows: Sequence[Row]) -> EncodedSet:
    examples = encode(rows, subject.tokenizer, name=name, max_length=LONGEST)
    return EncodedSet(name, rows, examples, range(len(rows)))


def _known(subject: Subject, rows: Rows, file: str) -> dict[str, Any]:
    """Return what the model answers to a file's questions, its examples standing in front."""
    examples = _after_examples(subject, rows[file], rows[f"{file}_icl"], file)
    texts = asked(subject, rows[file], examples)
    prompts = [prompt_of(one) for one in examples]
    return written(subject, file, prompts, texts, new_tokens=KNOWN_TOKENS, stops=STOPS)


def _after_examples(subject: Subject, rows: Sequence[Row], shown: Sequence[Row], name: str) -> list[Example]:
    """Return questions after examples: as turns of a chat where the tokenizer has a template, else as one text."""
    template = subject.settings.template
    if subject.tokenizer.chat_template and template == PLAIN_TEMPLATE:
        turns = tuple(turn for one in shown for turn in (*one.messages, ("assistant", one.answer)))
        rows = [Row(one.number, (*turns, *one.messages), one.answer) for one in rows]
    else:
        template = written_out(template)
        shots = "".join(template.replace("{prompt}", one.prompt) + one.answer + "\n\n" for one in shown)
        template = shots + template
    return encode(rows, subject.tokenizer, name=name, template=template, max_length=LONGEST)
