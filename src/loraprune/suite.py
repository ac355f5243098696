"""Suite: what the suites of TOFU and MUSE share: their files, what a model writes, attacks, the log.

Reads    a folder of a suite's files, or its hub data set; a Subject
Gives    run_suite, Rows, Source, asked, written, log_attacks, not_measured, refuse_reference
Source   open-unlearning, arXiv 2506.12618, for what each row's entry holds
Symbols  -
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprune.cache import Cache, cache_folder
from loraprune.data import NO_LABEL, Example
from loraprune.errors import UserError
from loraprune.evaluation_log import EvaluationLog, read_log
from loraprune.generation import end_tokens, generate
from loraprune.log_aggregates import Entry
from loraprune.log_pairs import check_pair, check_tokens
from loraprune.log_writer import Content, attacked, metric, write_log
from loraprune.model import check_machine, quiet_libraries
from loraprune.progress import stage
from loraprune.rouge import rouge
from loraprune.row_scores import EncodedSet, Subject, prompt_of
from loraprune.settings import Settings
from loraprune.sources import LOOKS_LIKE_FILE, Record, Row, load_rows, read_source

if TYPE_CHECKING:
    from loraprune.benchmark import Request

Rows = dict[str, list[Row]]

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
NO_NUMBER = float("nan")
LOGGED = ("rouge1_recall", "rougeL_f1", "rougeL_recall")
ATTACKS = {"mia_loss": "loss", "mia_zlib": "zlib", "mia_min_k": "min_k", "mia_min_k_plus_plus": "min_k_plus_plus"}


@dataclass(frozen=True)
class Source:
    """Where a suite's files are: a folder on this machine, or a data set on the hub with configs of their names."""

    where: str

    def rows(self, name: str) -> list[Row]:
        """Return a file's rows; UserError where it is not there."""
        return load_rows(self.path(name), name=name)

    def records(self, name: str) -> list[Record]:
        """Return a file's rows as they stand in it."""
        return read_source(self.path(name), name=name)

    def path(self, name: str) -> str:
        """Return what `load_rows` reads for a name such as forget10, or knowmem/forget_qa."""
        found = self.find(name)
        if found is None:
            raise UserError(
                f"{self.where} has no {name}{SUFFIXES[0]}.",
                "the suite's numbers are of all its files.",
                f"add it to the folder, as {', '.join(SUFFIXES)}, or name the folder that has it with --data.",
            )
        return found

    def find(self, name: str) -> str | None:
        """Return the same, or None for a file that the folder lacks; what the hub has shows when it is read."""
        folder = Path(self.where).expanduser()
        if folder.is_dir():
            paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
            return next((str(path) for path in paths if path.is_file()), None)
        if LOOKS_LIKE_FILE.search(self.where):
            raise UserError(
                f"the folder {self.where} does not exist.",
                "a suite reads its files from a folder, or from the hub by owner/name.",
                "correct --data.",
            )
        config, _, split = name.partition("/")
        return f"{self.where}:{config}:{split or 'train'}"


def run_suite(
    name: str,
    settings: Settings,
    request: "Request",
    read: Callable[[Source], Rows],
    measure: Callable[[Subject, Rows, EvaluationLog | None], Content],
) -> tuple[Rows, dict[str, Entry]]:
    """Return a suite's rows and its aggregates on the settings' model, having written NAME_EVAL.json and its summary.

    Raises UserError for a file that is missing or a reference log of other rows, before anything is measured.
    """
    assert request.data is not None and request.output is not None  # read_request refuses the rest
    check_machine(settings)
    reference = None if request.reference_log is None else read_log(request.reference_log)
    with quiet_libraries():
        rows = read(Source(request.data))
        subject = Subject(settings.model, settings, Cache(cache_folder(settings.cache)))
        content = measure(subject, rows, reference)
    return rows, write_log(Path(request.output), name, content, reference)


def tokens_of(encoded: EncodedSet) -> list[int]:
    """Return how many answer tokens each row has, the last one left out."""
    return [sum(label != NO_LABEL for label in one.labels) - 1 for one in encoded.examples]


def asked(subject: Subject, rows: Sequence[Row], examples: Sequence[Example]) -> list[dict[str, str]]:
    """Return the rows' questions, as the model reads them, and right answers, whole where `--max-length` cuts them."""
    inputs = subject.texts([prompt_of(one) for one in examples])
    return [{"input": one, "ground_truth": row.answer.strip()} for one, row in zip(inputs, rows, strict=True)]


def written(
    subject: Subject,
    name: str,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[dict[str, str]],
    *,
    new_tokens: int,
    stops: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a metric of what the model writes, greedily, cut at the first of `stops`, against each right answer."""
    with stage(f"write {name}", len(prompts)) as advance:
        made = generate(
            subject.model,
            prompts,
            end_token_ids=end_tokens(subject.model, subject.tokenizer),
            max_new_tokens=new_tokens,
            advance=advance,
            **subject.options,
        )
    texts = [_until(text, stops).strip() for text in subject.texts([answer for [answer] in made])]
    scores = [asdict(one) for one in rouge([row["ground_truth"] for row in rows], texts)]
    pairs = zip(scores, rows, texts, strict=True)
    return metric([{**{one: score[one] for one in LOGGED}, **row, "generation": text} for score, row, text in pairs])


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def log_attacks(subject: Subject, reference: Subject | None, members: EncodedSet, others: EncodedSet) -> Content:
    """Return every membership attack of the suite, the gradient's and the reference's where they are asked for."""
    ours = [subject.teacher_forced(one) for one in (members, others)]
    found = {name: attacked(*(one[column] for one in ours)) for name, column in ATTACKS.items()}
    if subject.settings.gradient_norm:
        found["mia_gradnorm"] = attacked(*(subject.gradients(one)["gradient_norm"] for one in (members, others)))
    if reference is not None:
        theirs = [reference.teacher_forced(reference.encode(one.name, one.rows)) for one in (members, others)]
        beyond = [
            [here - there for here, there in zip(our["loss"], their["loss"], strict=True)]
            for our, their in zip(ours, theirs, strict=True)
        ]
        found["mia_reference"] = attacked(*beyond)
    return found


def not_measured(settings: Settings, rouge_metrics: Sequence[str], no_holdout: str | None) -> dict[str, Entry]:
    """Return an entry for each metric that was left out, saying what it lacks; `no_holdout` is why no attack was."""
    attacks = dict.fromkeys((*ATTACKS, "mia_gradnorm", "mia_reference", "privleak"), no_holdout)
    if no_holdout is None:
        gradient = None if settings.gradient_norm else "--no-gradient-norm was given"
        beside = None if settings.reference else "no --reference: this attack compares with its loss"
        attacks = {"mia_gradnorm": gradient, "mia_reference": beside}
    unwritten = () if settings.rouge_rows else rouge_metrics
    lacking = {**attacks, **dict.fromkeys(unwritten, "--rouge-rows is 0: no answers were generated")}
    return {name: {"agg_value": None, "missing": why} for name, why in lacking.items() if why is not None}


def refuse_reference(
    reference: EvaluationLog, table: str, rows: Sequence[dict[str, str]], tokens: Sequence[int]
) -> None:
    """Raise UserError, before anything is measured, where a reference's log is of other rows or another tokenizer."""
    known = {str(row): one for row, one in enumerate(rows)}
    check_pair(EvaluationLog(Path("this model"), "open-unlearning", (), {table: known}, {}), reference)
    check_tokens(reference, tokens)
