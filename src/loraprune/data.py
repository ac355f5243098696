"""Data: forget, retain, holdout and bystander sets from rows to batches; no error ever holds a row's text.

Reads    rows (load_rows, of sources.py); a tokenizer, with or without a chat template
Gives    Example, batches of tensors, the retain set's three parts, the overlap of two sets, a hash
Source   -
Symbols  b batch, t tokens (right-padded); -100 in `labels`: no label
"""

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor

from loraprune.errors import UserError
from loraprune.settings import INSTRUCTION
from loraprune.sources import Message, Row, say_rows
from loraprune.sources import load_rows as load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [begin, end)
Key = TypeVar("Key", bound=Hashable)

PLAIN_TEMPLATE = "Question: {prompt}\nAnswer: "
INSTRUCTION_TEMPLATE = (  # what the template's name INSTRUCTION stands for; a row with an input has a form of its own
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
INPUT_TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)
NO_LABEL = -100
STAND_IN = "[the answer stands here]"  # shows where a chat template puts an answer
PROMPT_DATE = "26 Jul 2024"  # what Llama 3's templates fall back to; today's would make another prompt every day


def data_hash(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of the rows' content in order, whatever file and numbers they came with."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.messages, row.answer, row.facts, row.fact_id]).encode() + b"\n")
    return digest.hexdigest()


def examples_hash(examples: Iterable["Example"]) -> str:
    """Return the SHA-256 of what a model is shown of a set: its tokens and labels, template and length included."""
    digest = hashlib.sha256()
    for one in examples:
        digest.update(json.dumps([one.input_ids, one.labels]).encode() + b"\n")
    return digest.hexdigest()


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One tokenised row, three tuples of one length. The first token is never a label: nothing predicts it."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]  # NO_LABEL where there is none
    facts: tuple[bool, ...]  # True at the answer tokens of a marked fact


@dataclass(frozen=True)
class _Script:
    """A row as the model reads it, before tokenising."""

    text: str
    boundary: int  # the character the answer begins at
    special_tokens: bool  # whether the tokenizer adds its own; chat templates write theirs
    end: bool  # whether an end-of-sequence token is appended


def encode(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    name: str,
    template: str = PLAIN_TEMPLATE,
    max_length: int = 512,
) -> list[Example]:
    """Return one example a row, cut at `max_length` tokens: labels on the answer and its end, on all of a plain text.

    The tokenizer's chat template is used if it has one and `template` is the default; else `template`, with the
    end-of-sequence token after the answer. Facts are marked by fast tokenizers only: slow ones know no offsets.
    """
    examples = [_encode_row(row, tokenizer, name, template, max_length) for row in rows]
    cut = [row.number for row, example in zip(rows, examples, strict=True) if set(example.labels) <= {NO_LABEL}]
    if cut:
        raise UserError(
            f"{len(cut)} of {len(rows)} rows of the {name} set keep no answer token: {say_rows(cut)}.",
            f"a row is cut after {max_length} tokens, and a row without an answer has no performance.",
            f"raise --max-length ({max_length}) or remove these rows.",
        )
    return examples


def prompt_ids(row: Row, tokenizer: "PreTrainedTokenizerBase", *, template: str = PLAIN_TEMPLATE) -> list[int]:
    """Return the tokens before the row's first answer token in `encode`; for a plain text, the BOS if there is one."""
    script = _write(row, tokenizer, "data", template)
    ids, spans = _tokenise(script, tokenizer)
    return ids[: _first_answer_token(spans, script.boundary)]


def _encode_row(row: Row, tokenizer: "PreTrainedTokenizerBase", name: str, template: str, max_length: int) -> Example:
    script = _write(row, tokenizer, name, template)
    ids, spans = _tokenise(script, tokenizer)
    first = max(_first_answer_token(spans, script.boundary), 1)
    labels = [NO_LABEL] * len(ids[:first]) + ids[first:]
    found = _find_facts(row, script) if tokenizer.is_fast else []
    facts = [any(begin < stop and end > start for start, stop in found) for begin, end in spans]
    facts[:first] = [False] * len(facts[:first])
    return Example(tuple(ids[:max_length]), tuple(labels[:max_length]), tuple(facts[:max_length]))


def _first_answer_token(spans: Sequence[Span], boundary: int) -> int:
    # The token that ends after the boundary is the answer's even where it begins before: " Basil" takes the space.
    return next((position for position, (_, end) in enumerate(spans) if end > boundary), len(spans))


def _find_facts(row: Row, script: _Script) -> list[Span]:
    stop = script.boundary + len(row.answer)
    patterns = [re.compile(re.escape(fact)) for fact in row.facts]
    return [match.span() for pattern in patterns for match in pattern.finditer(script.text, script.boundary, stop)]


def with_prompt_labels(example: Example) -> Example:
    """Return the example with a label on every token but the first."""
    return replace(example, labels=(NO_LABEL, *example.input_ids[1:]))


def written_out(template: str) -> str:
    """Return a template as text with {prompt}, whether it was given so or by its name."""
    return INSTRUCTION_TEMPLATE if template == INSTRUCTION else template


def _opening(row: Row, template: str) -> str:
    if template == INSTRUCTION and row.input:
        instruction = row.prompt.removesuffix(f"\n\n{row.input}")
        before, _, after = INPUT_TEMPLATE.partition("{prompt}")
        return before + instruction + after.replace("{input}", row.input)
    return written_out(template).replace("{prompt}", row.prompt)


def _write(row: Row, tokenizer: "PreTrainedTokenizerBase", name: str, template: str) -> _Script:
    if "{prompt}" not in written_out(template):
        raise UserError(
            "the plain template does not contain {prompt}.",
            "without it the model would be asked nothing.",
            f"write --template as in {PLAIN_TEMPLATE!r}, or {INSTRUCTION}.",
        )
    if not row.messages:
        return _Script(row.answer, 0, special_tokens=True, end=False)
    if tokenizer.chat_template and template == PLAIN_TEMPLATE:
        return _write_chat(row, tokenizer, name)
    opening = _opening(row, template)
    return _Script(opening + row.answer, len(opening), special_tokens=True, end=True)


def _write_chat(row: Row, tokenizer: "PreTrainedTokenizerBase", name: str) -> _Script:
    try:
        prompt = _render(row.messages, tokenizer, to_answer=True)
        whole = _render([*row.messages, ("assistant", row.answer)], tokenizer)
        opening, stand_in, _ = _render([*row.messages, ("assistant", STAND_IN)], tokenizer).rpartition(STAND_IN)
    except TemplateError:
        raise _template_broken(row, name, "the template refuses the conversation's roles or their order") from None
    if not whole.startswith(prompt) or not stand_in:
        raise _template_broken(row, name, "with its answer the conversation does not begin as it does without")
    # Some templates write more than the prompt before an answer (Qwen3: an empty thought), which is not the answer's.
    same = opening.startswith(prompt) and whole.startswith(opening)
    return _Script(whole, len(opening if same else prompt), special_tokens=False, end=False)


def _render(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", to_answer: bool = False) -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    written = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=to_answer, date_string=PROMPT_DATE
    )
    return str(written)


def _template_broken(row: Row, name: str, why: str) -> UserError:
    return UserError(
        f"the tokenizer's chat template cannot write row {row.number} of the {name} set.",
        f"{why}, so what is prompt and what is answer cannot be told.",
        "give --template a plain form other than the default, e.g. '{prompt} ': it replaces the chat template.",
    )


def _tokenise(script: _Script, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[Span]]:
    """Return token ids and the characters each stands for; tokens after the text's end have a span after it."""
    after = (len(script.text), len(script.text) + 1)
    if tokenizer.is_fast:
        encoded = tokenizer(script.text, add_special_tokens=script.special_tokens, return_offsets_mapping=True)
        ids, spans = list(encoded["input_ids"]), [(begin, end) for begin, end in encoded["offset_mapping"]]
        added = next((count for count, span in enumerate(reversed(spans)) if span != (0, 0)), 0)
        spans[len(spans) - added :] = [after] * added
    else:
        opening, answer = _tokenise_apart(script, tokenizer)
        ids, spans = opening + answer, [(0, 0)] * len(opening) + [after] * len(answer)
    if script.end and tokenizer.eos_token_id not in (None, *ids[-1:]):
        ids, spans = [*ids, tokenizer.eos_token_id], [*spans, after]
    return ids, spans


def _tokenise_apart(script: _Script, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    # A space before the answer goes with the answer, as it would were both tokenised as one.
    opening = script.text[: script.boundary].rstrip(" ")
    ids = list(tokenizer(opening, add_special_tokens=script.special_tokens)["input_ids"])
    if ids[-1:] == [tokenizer.eos_token_id]:
        ids.pop()
    return ids, list(tokenizer(script.text[len(opening) :], add_special_tokens=False)["input_ids"])


# --- batches ----------------------------------------------------------------------------------------------------------


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels (int64) and facts (bool), each (b, t), padded on the right."""
    length = max(len(example.input_ids) for example in examples)

    def pad(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (length - len(values))]

    return {
        "input_ids": torch.tensor([pad(example.input_ids, pad_token_id) for example in examples]),
        "attention_mask": torch.tensor([pad([1] * len(example.input_ids), 0) for example in examples]),
        "labels": torch.tensor([pad(example.labels, NO_LABEL) for example in examples]),
        "facts": torch.tensor([pad(example.facts, False) for example in examples], dtype=torch.bool),
    }


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch where the model is: `collate` makes it in main memory."""
    return {name: one.to(device) for name, one in batch.items()}


def batches_by_length(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Return batches of indices, shortest examples first and ties in order, so that little is padded."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


# --- withheld rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetainSplit:
    """The retain set's parts: taught rows train, floor rows steer, the last evaluation alone sees final rows."""

    taught: list[Row]
    floor: list[Row]
    final: list[Row]


def split_retain(rows: Sequence[Row], seed: int, withheld: int | None = None) -> RetainSplit:
    """Split by seed: `withheld` rows half and half into floor and final rows, None: a tenth of the units each.

    A unit is the rows of one fact_id or one text, which stay together; at least 3 units.
    """
    units = find_facts(rows)
    order = sorted(set(units))
    if len(order) < 3:
        raise UserError(
            f"the retain set has {len(rows)} rows but only {len(order)} that differ; a split needs 3.",
            "taught, floor and final rows must not say the same, or retention would measure what was taught again.",
            "add rows to --retain.",
        )
    random.Random(f"{seed}/split").shuffle(order)
    if withheld is None:
        tenth = max(1, round(len(order) / 10))
        floor, final = set(order[:tenth]), set(order[tenth : 2 * tenth])
    else:
        floor, final = _withhold(order, Counter(units), withheld)
    part_of = ["floor" if unit in floor else "final" if unit in final else "taught" for unit in units]
    parts = {part: [row for row, mine in zip(rows, part_of, strict=True) if mine == part] for part in set(part_of)}
    return RetainSplit(**parts)


def _withhold(order: Sequence[int], sizes: Mapping[int, int], withheld: int) -> tuple[set[int], set[int]]:
    """Return the units, in order, of the floor rows and of the final rows: together at least `withheld` rows."""
    left, parts = list(order), []
    for wanted in (withheld - withheld // 2, withheld // 2):
        part: set[int] = set()
        while left and sum(sizes[unit] for unit in part) < wanted:
            part.add(left.pop(0))
        parts.append(part)
    if not left:
        raise UserError(
            f"{withheld} rows are to be withheld of {sum(sizes.values())}: none is left to train on.",
            "rows that say the same are withheld together.",
            "lower --withheld-rows.",
        )
    return parts[0], parts[1]


def sample_rows(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """Return at most `count` of the rows, chosen by the seed, in their order; None: all."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[place] for place in sorted(random.Random(f"{seed}/rows").sample(range(len(rows)), count))]


def find_facts(rows: Sequence[Row], *, by_subject: bool = False) -> list[int]:
    """Return each row's fact, named by its first row: rows tied by fact_id or text, be it through others, share one.

    `by_subject` also ties the rows of one subject.
    """
    parents = list(range(len(rows)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = index = parents[parents[index]]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        ties = [("text", normalise(row.text)), *([("fact_id", row.fact_id)] if row.fact_id else [])]
        ties += [("subject", row.subject)] if by_subject and row.subject else []
        for tie in ties:
            low, high = sorted((root(first.setdefault(tie, index)), root(index)))
            parents[high] = low
    return [root(index) for index in range(len(rows))]


# --- overlap ----------------------------------------------------------------------------------------------------------

COMMON = 20  # a phrase of more rows than this is a template's; it makes no pair of rows a candidate


@dataclass(frozen=True)
class Overlap:
    """Rows of the forget set that stand in the retain set, by their numbers: (forget, retain[, containment])."""

    exact: tuple[tuple[int, int], ...]
    near: tuple[tuple[int, int, float], ...]  # containment in [threshold, 1], highest first


class _Folding(dict[int, str]):
    """What `str.translate` puts for a character: a space for punctuation, white space and controls."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character)[0] in "PZC" else character
        return self[code]


_FOLDING = _Folding()


def normalise(text: str) -> str:
    """Return the text in NFKC and without case, punctuation and white space folded to single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_FOLDING).split())


def find_overlap(forget: Sequence[Row], retain: Sequence[Row], *, ngram: int = 5, threshold: float = 0.5) -> Overlap:
    """Return rows that are equal after `normalise`, and rows of which the smaller stands in the larger by `threshold`.

    Containment: the share of the smaller row's word n-grams that the larger holds. A phrase of more than 20 rows of
    either set counts as not shared, so rows of one template do not all resemble each other.
    """
    ours, theirs = ([normalise(row.text) for row in rows] for rows in (forget, retain))
    exact, near = [], []
    for (one, other), containment in _containments(ours, theirs, ngram).items():
        if containment >= threshold and ours[one] != theirs[other]:
            near.append((forget[one].number, retain[other].number, containment))
    places = _places([{text} for text in theirs])
    for row, text in zip(forget, ours, strict=True):
        exact += [(row.number, retain[other].number) for other in places.get(text, ())]
    return Overlap(tuple(exact), tuple(sorted(near, key=lambda pair: (-pair[2], pair))))


def _containments(ours: Sequence[str], theirs: Sequence[str], ngram: int) -> dict[tuple[int, int], float]:
    """Return the containment of every pair of texts that shares an uncommon n-gram, by the pair's indices."""
    our_grams, their_grams = ([_word_grams(text, ngram) for text in texts] for texts in (ours, theirs))
    our_places, their_places = _places(our_grams), _places(their_grams)
    shared: Counter[tuple[int, int]] = Counter()
    for gram, rows in our_places.items():
        others = their_places.get(gram, ())
        if len(rows) <= COMMON and len(others) <= COMMON:
            shared.update(product(rows, others))
    return {pair: count / min(len(our_grams[pair[0]]), len(their_grams[pair[1]])) for pair, count in shared.items()}


def _word_grams(text: str, ngram: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[begin : begin + ngram]) for begin in range(max(1, len(words) - ngram + 1))}


def _places(sets: Sequence[set[Key]]) -> dict[Key, list[int]]:
    """Return for every element the indices of the sets that hold it."""
    places: dict[Key, list[int]] = defaultdict(list)
    for index, elements in enumerate(sets):
        for element in elements:
            places[element].append(index)
    return places


def refuse_overlap(overlap: Overlap, *, allow_overlap: bool) -> None:
    """Raise if a row stands in both sets and that was not allowed; near pairs are for the report."""
    if allow_overlap or not overlap.exact:
        return
    count = len({one for one, _ in overlap.exact})
    pairs = ", ".join(f"forget row {one} = retain row {other}" for one, other in overlap.exact[:5])
    more = f" and {len(overlap.exact) - 5} more" if len(overlap.exact) > 5 else ""
    stand = "row of the forget set stands" if count == 1 else "rows of the forget set stand"
    raise UserError(
        f"{count} {stand} in the retain set: {pairs}{more}.",
        "what is forgotten would be taught again by the repair, and retention would count it as lost.",
        "remove these rows from --retain, or give --allow-overlap.",
    )
