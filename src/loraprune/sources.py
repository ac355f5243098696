"""Sources: files, folders and hub names, read and checked into rows; no error ever holds a row's text.

Reads    .jsonl .json .csv .parquet .txt, a folder saved by `datasets`, a hub name `name:config:split`
Gives    Row, load_rows; what cannot be read is refused by file and row number, never dropped
Source   -
Symbols  number: the line a row starts on in .jsonl and .txt, its position (from 1, no header) elsewhere
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprune.errors import UserError, nearest

Message = tuple[str, str]  # (role, content)
Record = tuple[int, dict[str, Any]]  # (row number, columns)

# Roles on the left, the columns they are usually called on the right; the first that fits a set is taken.
LAYOUTS: tuple[dict[str, str], ...] = (
    {"messages": "messages"},
    {"prompt": "question", "answer": "answer"},
    {"prompt": "instruction", "answer": "response"},
    {"prompt": "instruction", "answer": "output"},
    {"prompt": "prompt", "answer": "completion"},
    {"text": "text"},
)
MAIN_ROLES = ("messages", "prompt", "answer", "text")
OPTIONAL_ROLES = (
    *("input", "facts", "fact_id", "subject"),
    *("paraphrased_question", "paraphrased_answer", "perturbed_answer"),
)

PLAIN_NAME = re.compile(r"[\w.-]{1,40}")
DOCUMENT_SEPARATOR = "<|endoftext|>"
LOOKS_LIKE_FILE = re.compile(r"^[.~/\\]|\\|/.*/|\.[A-Za-z]+\d?$")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    """One row of a set: a conversation (empty for plain text), its answer, and the facts the answer carries."""

    number: int  # of its source, from 1; what errors name
    messages: tuple[Message, ...]
    answer: str
    facts: tuple[str, ...] = ()  # strings of the answer
    fact_id: str | None = None  # rows with the same one say the same fact and are never split apart
    paraphrased_answer: str | None = None  # the right answer in other words, for the truth ratio
    perturbed_answers: tuple[str, ...] = ()  # wrong answers in the paraphrase's form
    input: str | None = None  # what an instruction is about; it also ends the last message
    subject: str | None = None  # whom the row is about; an attack that learns a half shows no half of a subject
    paraphrased_questions: tuple[str, ...] = ()  # the question in other words

    @property
    def prompt(self) -> str:
        return "\n".join(content for _, content in self.messages)

    @property
    def text(self) -> str:
        return f"{self.prompt}\n{self.answer}" if self.messages else self.answer


def load_rows(source: str, *, name: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return the rows of a file, saved folder or hub data set; every row is checked, none is dropped.

    `name` (forget, retain, holdout, bystander, data) names the set in errors. `columns` maps our roles to the
    source's columns where they are called otherwise, e.g. {"prompt": "q", "answer": "a"} or {"text": "body"}.
    """
    records = read_source(source, name=name)
    if not records:
        raise UserError(f"the {name} set is empty.", "nothing can be measured on no rows.", f"give --{name} some rows.")
    layout = _find_layout(records, columns or {}, name=name)
    rows, faults = [], defaultdict(list)
    for number, record in records:
        try:
            rows.append(_build_row(number, record, layout))
        except _RowFault as fault:
            faults[str(fault)].append(number)
    for what, numbers in faults.items():
        raise _faulty_rows(what, numbers, name)
    return rows


class _RowFault(Exception):
    """What is wrong with a row, without its text: rows with the same fault are reported together."""


def _faulty_rows(what: str, numbers: Sequence[int], name: str) -> UserError:
    return UserError(
        f"the {name} set has {what}: {say_rows(numbers)}.",
        "a row that is dropped or guessed in silence would change what is forgotten and what is measured.",
        f"mend or remove {'it' if len(numbers) == 1 else 'them'} and give the set to --{name} again.",
    )


def say_rows(numbers: Sequence[int]) -> str:
    """Return "row 3" or "rows 1, 2, 3, 4, 5 and 7 more"."""
    shown = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"{'row' if len(numbers) == 1 else 'rows'} {shown}{more}"


def _find_layout(records: Sequence[Record], columns: Mapping[str, str], *, name: str) -> dict[str, str]:
    """Return which column has which role (prompt, answer ...): as `columns` says, else by the columns' usual names."""
    present = list(dict.fromkeys(column for _, record in records for column in record))
    _check_columns(present, columns, name)
    main = {role: column for role, column in columns.items() if role in MAIN_ROLES}
    for usual in LAYOUTS:
        layout = usual | main
        if main.keys() <= usual.keys() and all(column in present for column in layout.values()):
            return layout | _optional_columns(present, layout) | dict(columns)
    known = "; ".join(" and ".join(layout.values()) for layout in LAYOUTS)
    raise UserError(
        f"the {name} set's columns are not understood: {_say_columns(present)}.",
        f"known are {known}.",
        "say which column is which with --columns, e.g. prompt=q,answer=a or text=body.",
    )


def _check_columns(present: Sequence[str], columns: Mapping[str, str], name: str) -> None:
    for role, column in columns.items():
        if role not in (*MAIN_ROLES, *OPTIONAL_ROLES):
            raise _unknown_word(f"--columns has no role {role!r}", role, (*MAIN_ROLES, *OPTIONAL_ROLES))
        if column not in present:
            raise _unknown_word(f"the {name} set has no column {column!r}", column, present)


def _unknown_word(what: str, word: str, known: Sequence[str]) -> UserError:
    close = nearest(word, [other for other in known if PLAIN_NAME.fullmatch(other)])
    fix = f"write {close!r} for {word!r} in --columns." if close else "name one of these in --columns."
    return UserError(f"{what}.", f"there are {_say_columns(known)}.", fix)


def _say_columns(present: Sequence[str]) -> str:
    # Without a header line, the first row's text would pass for column names.
    plain = [column for column in present if PLAIN_NAME.fullmatch(column)]
    hidden = len(present) - len(plain)
    return ", ".join([*plain, *([f"{hidden} that are no plain names (is there a header?)"] if hidden else [])])


def _optional_columns(present: Sequence[str], layout: Mapping[str, str]) -> dict[str, str]:
    # `input` stands beside `instruction` only: elsewhere the name means something else.
    names = [role for role in OPTIONAL_ROLES if role != "input" or layout.get("prompt") == "instruction"]
    return {role: role for role in names if role in present}


def _build_row(number: int, record: Mapping[str, Any], layout: Mapping[str, str]) -> Row:
    values = {role: record.get(column) for role, column in layout.items()}
    *messages, (role, answer) = _conversation(values)
    if role != "assistant" or ("messages" in values and not messages):
        raise _RowFault("conversations that do not end with the assistant's answer to a message")
    return Row(
        number=number,
        messages=tuple(messages),
        answer=answer,
        input=None if _is_blank(values.get("input")) else values.get("input"),
        facts=_read_facts(values.get("facts"), answer),
        fact_id=_read_name(values.get("fact_id")),
        paraphrased_answer=next(iter(_read_texts(values.get("paraphrased_answer"), "paraphrased answers")), None),
        perturbed_answers=_read_texts(values.get("perturbed_answer"), "perturbed answers"),
        subject=_read_name(values.get("subject")),
        paraphrased_questions=_read_texts(values.get("paraphrased_question"), "paraphrased questions"),
    )


def _read_name(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _conversation(values: Mapping[str, Any]) -> list[Message]:
    if "text" in values:
        return [("assistant", _check_text(values["text"], "text"))]
    if "messages" in values:
        return _check_messages(values["messages"])
    return _turns(values["prompt"], "user", values.get("input")) + _turns(values["answer"], "assistant")


def _turns(value: Any, role: str, extra: Any = None) -> list[Message]:
    """Return a prompt's or an answer's turns: it is a string, or a list of messages."""
    if isinstance(value, list):
        return _check_messages(value)
    text = _check_text(value, "answer" if role == "assistant" else "prompt")
    return [(role, text if _is_blank(extra) else f"{text}\n\n{_check_text(extra, 'input')}")]


def _is_blank(value: Any) -> bool:
    return value is None or value == "" or str(value).isspace()


def _check_messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _RowFault("a missing or empty list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _RowFault("messages that are not objects with a role and a content")
    return [(message["role"], _check_text(message.get("content"), "content")) for message in value]


def _check_text(value: Any, kind: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _RowFault(f"no {kind} (missing, empty or not a string)")
    # JSON can spell half a surrogate pair; no tokenizer takes it.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _RowFault(f"a broken character in its {kind} (half a surrogate pair)")
    return value


def _read_facts(value: Any, answer: str) -> tuple[str, ...]:
    facts = _read_texts(value, "facts")
    if any(fact not in answer for fact in facts):
        raise _RowFault("facts that do not stand in the answer, letter for letter")
    return facts


def _read_texts(value: Any, kind: str) -> tuple[str, ...]:
    """Return the texts of a column that holds one or several, without empty ones."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise _RowFault(f"{kind} that are neither a string nor a list of strings")
    return tuple(one for one in texts if one.strip())


# --- files and folders ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubName:
    """A data set on the hub: `name`, `name:config`, `name:config:split` or `name::split`."""

    name: str
    config: str | None
    split: str


def read_source(source: str, *, name: str) -> list[Record]:
    """Return the rows of a file, a saved folder or a hub data set; `name` is the set's name in errors."""
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, name)
    folder, _, split = source.partition(":")
    if path.is_dir():
        return _read_folder(path, "", name)
    if folder and Path(folder).expanduser().is_dir():
        return _read_folder(Path(folder).expanduser(), split, name)
    if LOOKS_LIKE_FILE.search(folder):
        raise _missing_file(path, name)
    return _read_hub(source, name)


def parse_hub_name(source: str) -> HubName:
    """Split `name:config:split`; config defaults to none, split to train and may be a slice (`train[:100]`)."""
    name, config, split = [*source.split(":", 2), "", ""][:3]
    return HubName(name, config or None, split or "train")


def _missing_file(path: Path, name: str) -> UserError:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, siblings)
    return UserError(
        f"the {name} set's file {path} does not exist.",
        f"its folder holds {close}." if close else "nothing of that name is on this machine.",
        f"give --{name} an existing file or folder, or a hub name as name:config:split.",
    )


def _unreadable(path: Path, name: str, what: str) -> UserError:
    return UserError(
        f"the {name} set's file {path.name} {what}.",
        "every row must be read, or numbers over the set would be about another set.",
        f"mend the file and give it to --{name} again.",
    )


def _read_file(path: Path, name: str) -> list[Record]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        raise UserError(
            f"the {name} set's file {path.name} has a format that is not read.",
            f"the suffix decides how a file is read; known are {known}.",
            f"convert it, say to .jsonl, and give that to --{name}.",
        )
    try:
        return reader(path, name)
    except UnicodeDecodeError as error:
        raise _unreadable(path, name, f"is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise _unreadable(path, name, f"cannot be read ({type(error).__name__})") from error


def _read_json_lines(path: Path, name: str) -> list[Record]:
    # Not splitlines(): it also splits at U+2028 and its like, which JSON strings may hold.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [(number, _parse_line(line, number, path, name)) for number, line in enumerate(lines, 1) if line.strip()]


def _parse_line(line: str, number: int, path: Path, name: str) -> dict[str, Any]:
    record = _parse(line)
    if isinstance(record, dict):
        return record
    fault = "not valid JSON" if record is _BROKEN else "not a JSON object"
    raise _unreadable(path, name, f"has a line that is {fault}: line {number}")


_BROKEN = object()


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _BROKEN


def _read_json(path: Path, name: str) -> list[Record]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _has_json_lines(text):
            return _read_json_lines(path, name)
        line = getattr(error, "lineno", 1)
        raise _unreadable(path, name, f"is not valid JSON: line {line}") from None
    items = _items(whole)
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise _unreadable(path, name, f"has an item that is not a JSON object: item {number}")
    return list(enumerate(items, 1))


def _has_json_lines(text: str) -> bool:
    # Two lines are looked at, since the first may be the broken one.
    first = [line for line in text.split("\n") if line.strip()][:2]
    return any(isinstance(_parse(line), dict) for line in first)


def _items(whole: Any) -> list[Any]:
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        return whole["data"]
    return whole if isinstance(whole, list) else [whole]  # a lone object is JSON Lines of one line


def _read_csv(path: Path, name: str) -> list[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            records = list(enumerate(csv.DictReader(file, strict=True), 1))
        except csv.Error:
            raise _unreadable(path, name, "is not valid CSV (a quote left open, or a field over 128 KiB)") from None
    for number, record in records:
        if None in record:
            raise _unreadable(path, name, f"has a row with more fields than its header: row {number}")
    return records


def _read_parquet(path: Path, name: str) -> list[Record]:
    # pyarrow itself and not `datasets`, which would leave a copy of the forget data in its cache.
    import pyarrow
    import pyarrow.parquet

    try:
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    except pyarrow.ArrowException:
        raise _unreadable(path, name, "is not a valid Parquet file") from None


def _read_text(path: Path, name: str) -> list[Record]:
    """Documents apart by `<|endoftext|>` where it occurs, else by blank lines, else one document a line."""
    text = path.read_text(encoding="utf-8-sig")
    blank_line = r"\n[^\S\n]*\n"
    if DOCUMENT_SEPARATOR in text:
        separator = re.escape(DOCUMENT_SEPARATOR)
    else:
        separator = blank_line if re.search(blank_line, text.strip()) else r"\n"
    return _documents(text, separator)


def _documents(text: str, separator: str) -> list[Record]:
    records, begin, line = [], 0, 1
    for end, after in [*(match.span() for match in re.finditer(separator, text)), (len(text), len(text))]:
        document = text[begin:end]
        if document.strip():
            leading = document[: len(document) - len(document.lstrip())]
            records.append((line + leading.count("\n"), {"text": document.strip()}))
        line += text.count("\n", begin, after)
        begin = after
    return records


Reader = Callable[[Path, str], list[Record]]
READERS: dict[str, Reader] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _read_folder(folder: Path, split: str, name: str) -> list[Record]:
    if (folder / "dataset_dict.json").is_file():
        return _read_saved(_choose_split(folder, split, name), name)
    if (folder / "state.json").is_file() and not split:
        return _read_saved(folder, name)
    what = f"holds one set, not the split {split}" if split else "was not saved by `datasets`"
    raise UserError(
        f"the {name} set's folder {folder} {what}.",
        "a folder is read with datasets.load_from_disk.",
        f"give --{name} a file, a folder made by save_to_disk, or folder:split where it holds splits.",
    )


def _choose_split(folder: Path, split: str, name: str) -> Path:
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if split in splits:
        return folder / split
    what = f"has no split {split}" if split else f"holds {len(splits)} splits and none is chosen"
    raise UserError(
        f"the {name} set's folder {folder} {what}.",
        f"its splits are {', '.join(splits)}.",
        f"give --{name} {folder}:{nearest(split, splits) or splits[0]}.",
    )


def _read_saved(folder: Path, name: str) -> list[Record]:
    from datasets import Dataset

    try:
        return list(enumerate(Dataset.load_from_disk(str(folder)).to_list(), 1))
    except Exception as error:  # pyarrow's, fsspec's and datasets' errors share no base
        raise _unreadable(folder, name, f"cannot be read by datasets ({type(error).__name__})") from error


def _read_hub(source: str, name: str) -> list[Record]:
    hub = parse_hub_name(source)
    if not HUB_NAME.fullmatch(hub.name):
        raise UserError(
            f"the {name} set's source {source!r} is neither a file, a folder nor a hub name.",
            "a hub name is owner/name, then perhaps :config:split.",
            f"give --{name} an existing path or a hub name.",
        )
    from datasets import load_dataset

    try:
        loaded: Any = load_dataset(hub.name, hub.config, split=hub.split)
        return list(enumerate(loaded.to_list(), 1))
    except Exception as error:  # the hub's, the network's and datasets' errors share no base
        raise _hub_failed(hub, name, error) from error


def _hub_failed(hub: HubName, name: str, error: Exception) -> UserError:
    # Only a plain ValueError is quoted: it lists configs or splits. Subclasses (pyarrow's) quote cells of the data.
    detail = f": {str(error).splitlines()[0]}" if type(error) is ValueError and str(error) else ""
    return UserError(
        f"the {name} set {hub.name} (config {hub.config or 'default'}, split {hub.split}) cannot be loaded.",
        f"no file or folder has that name here, and the hub gave {type(error).__name__}{detail}.",
        f"give --{name} an existing file, or check name:config:split, the network and `hf auth login`.",
    )
