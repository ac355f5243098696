"""Report: a run's numbers as a table, a figure, a page and a model card; never a word of a data set.

Reads    the content of metrics.json, events.jsonl, decision.json, reproduce.json and config.toml
Gives    result_table, write_report, model_card
Source   colours that colour-blind readers tell apart: Okabe and Ito, 2008
Symbols  P = performance; share = S / (1 + S)
"""

import base64
import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from loraprune.errors import UserError
from loraprune.events import read_events
from loraprune.figure import figure_bytes
from loraprune.folder import write_text
from loraprune.setting import value_text
from loraprune.settings import Settings
from loraprune.settings_file import settings_from
from loraprune.words import (
    ENDINGS,
    FORMS,
    TARGET_SOURCES,
    Values,
    apart,
    band_texts,
    duration_text,
    number_text,
    outcome_text,
    percent,
)

SOURCES = (
    *("model", "reference", "original", "forget", "retain", "data", "holdout", "bystander", "guard"),
    *("already_forgotten", "floor_rows", "final_rows"),
)
OWN_CODE = (
    "",
    "Its layers differ in width, which no stock class holds: `modeling_per_layer.py` in this folder builds each layer",
    "of the stock class from its own widths (`per_layer_config` in config.json). With loraprune installed,",
    '`loraprune.load_pruned("this/folder")` loads it without running code from the folder.',
)
FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")

# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultRow:
    """One line of the end table; what does not apply is empty."""

    name: str
    before: str = ""
    after: str = ""
    change: str = ""
    reference: str = ""
    target: str = ""


def result_rows(metrics: Values) -> list[ResultRow]:
    """Return the lines of the end table; sets that the run did not have are absent."""
    return [*_model_rows(metrics), *_set_rows(metrics), *_limit_rows(metrics), *_retention_rows(metrics)]


def _model_rows(metrics: Values) -> list[ResultRow]:
    model = metrics["model"]
    pairs = {name: model[name] for name in ("parameters", "bytes") if name in model}
    pairs |= {f"{kind}s": pair for kind, pair in model.get("groups", {}).items()}
    rows = [_count_row(name, pair) for name, pair in pairs.items() if pair["after"] is not None]
    return [*rows, ResultRow("sparsity", after=number_text(metrics["sparsity"]))]


def _form_words(metrics: Values) -> str:
    """Return in which form the checkpoint was written; empty for runs that did not say."""
    model = metrics["model"]
    return f"The checkpoint's form is {FORMS[model['form']]} ({model['class']})." if "form" in model else ""


def _count_row(name: str, pair: Values) -> ResultRow:
    change = percent((pair["after"] - pair["before"]) / pair["before"], "+") if pair["before"] else ""
    return ResultRow(name, number_text(pair["before"]), number_text(pair["after"]), change)


def _set_rows(metrics: Values) -> list[ResultRow]:
    kept = "retain" if metrics.get("forget") else "data"
    named = {"retain": f"{kept}, final rows", "retain_taught": f"{kept}, taught rows"}
    rows = _forget_rows(metrics)
    for name in ("retain", "retain_taught", "bystander", "holdout"):
        if metrics.get(name):
            rows.append(_measure_row(f"P({named.get(name, name)})", metrics[name], "performance"))
    return rows


def _forget_rows(metrics: Values) -> list[ResultRow]:
    block, target = metrics.get("forget"), metrics.get("target")
    if not block:
        return []
    band = " .. ".join(band_texts(target)) if target else ""
    rows = [_measure_row("P(forget)", block, "performance", band)]
    measures = {"exact_match": "exact match, forget", "fact_performance": "fact performance, forget"}
    return rows + [_measure_row(words, block, name) for name, words in measures.items() if _has(block, name)]


def _has(block: Values, measure: str) -> bool:
    return block["before"].get(measure) is not None and block["after"].get(measure) is not None


def _measure_row(name: str, block: Values, measure: str, target: str = "") -> ResultRow:
    before, after = block["before"][measure], block["after"][measure]
    reference = (block.get("reference") or {}).get(measure)
    return ResultRow(
        name,
        number_text(before),
        number_text(after),
        f"{round(after - before, 3) + 0.0:+.3f}",  # + 0.0: no minus in front of nothing
        "" if reference is None else number_text(reference),
        target,
    )


def _limit_rows(metrics: Values) -> list[ResultRow]:
    """Return the lines of the second floor and of earlier requests, with what each may not rise above."""
    rows = []
    for number, one in enumerate(metrics.get("already_forgotten") or [], start=1):
        name, most = f"P(already forgotten {number})", f"<= {number_text(one['ceiling'])}"
        rows.append(_measure_row(name, one, "performance", most))
    if guard := metrics.get("guard"):
        rows.append(_measure_row("loss, guard text", guard, "loss"))
        most = f"<= {number_text(float(guard['max_guard_loss_ratio']))}"
        rows.append(ResultRow("  to the original's", after=number_text(guard["loss_ratio"]), target=most))
    return rows


def _retention_rows(metrics: Values) -> list[ResultRow]:
    floor = metrics["floor"]
    least = f">= {number_text(floor['min_retain_performance'])}" if floor.get("min_retain_performance") else ""
    lines = {
        "final": (metrics.get("retention"), ""),
        "taught": (metrics.get("retention_taught"), ""),
        "floor": (floor.get("retention"), least),
    }
    intervals = {"final": metrics.get("retention_interval"), "floor": floor.get("interval")}
    rows = []
    for name, (value, bound) in lines.items():
        if value is not None:
            rows.append(ResultRow(f"retention, {name} rows", after=number_text(value), target=bound))
        if interval := intervals.get(name):
            rows.append(ResultRow("  95 % interval", after=" .. ".join(apart(*interval))))
    return rows


def _used_columns(rows: Sequence[ResultRow]) -> list[str]:
    optional = ("reference", "target")
    return ["before", "after", "change", *(name for name in optional if any(getattr(row, name) for row in rows))]


def result_table(metrics: Values) -> Table:
    """Return the end table of a run, with what ended it below."""
    rows = result_rows(metrics)
    columns = _used_columns(rows)
    table = Table(box=SIMPLE_HEAD, caption=Text(outcome_text(metrics)), caption_justify="left")
    table.caption_style = "bold green" if metrics["goal_met"] else "bold yellow"
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name == "after" else "", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.name), *(Text(getattr(row, name)) for name in columns))
    return table


# --- what may be shown ------------------------------------------------------------------------------------------------


def local_name(source: str) -> str:
    """Return the last component of a local path, and a hub name as it is: no report tells whose disk it was."""
    if _is_rooted(source) or source.endswith(FILE_ENDINGS) or Path(source).exists():
        return PureWindowsPath(source).name or source  # splits at both slashes
    return source


def _is_rooted(source: str) -> bool:
    return source.startswith(("/", "\\", "~", "./", "../")) or re.match(r"[A-Za-z]:[\\/]", source) is not None


def without_folders(value: Any) -> Any:
    """Return plain values with every local path in them, keys included, reduced to its last component."""
    if isinstance(value, Mapping):
        return {without_folders(name): without_folders(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    return _line_without_folders(value) if isinstance(value, str) else value


def _line_without_folders(line: str) -> str:
    if not re.search(r"\s", line):
        return _word_without_folders(line)
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe, not a quote
        words = line.split()
    return " ".join(_word_without_folders(word) for word in words)


def _word_without_folders(word: str) -> str:
    name, equals, value = word.rpartition("=")
    return name + equals + (PureWindowsPath(value).name if _is_rooted(value) else value)


def changed_settings(values: Values) -> dict[str, str]:
    """Return the settings that differ from their defaults, as text; the run's folder is left out."""
    settings = settings_from(values)
    names = settings.changed(Settings())
    return {name: _setting_text(name, getattr(settings, name)) for name in names if name != "output"}


def _setting_text(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{role}={column}" for role, column in value.items())
    if name in SOURCES and isinstance(value, tuple):
        return ", ".join(map(local_name, value))
    return local_name(value) if name in SOURCES else value_text(value)


def limits(metrics: Values) -> list[str]:
    """Return in sentences what the run's numbers do not show."""
    if not metrics.get("forget"):
        return [
            "Nothing here is a guarantee: the numbers are those of the rows they were measured on.",
            "The performance is that of the right answer, token by token; generated text was not judged.",
            "Other abilities, languages and tasks than those of the data were not measured.",
        ]
    return [
        "Nothing here is a guarantee that what was removed cannot be brought back.",
        "No attack was run: neither relearning on a few rows, nor rephrased or translated questions, nor quantising "
        "the weights, nor reading the hidden states.",
        "P(forget) is that of the right answer, token by token, on the rows of the forget set; generated text was not "
        "judged, and the same facts under other words may be known better.",
        *_unmeasured(metrics),
    ]


def _unmeasured(metrics: Values) -> list[str]:
    sentences = []
    target = metrics.get("target")
    if target and target["source"] in ("tenth", "forget_target"):
        sentences.append(
            f"The target is {TARGET_SOURCES[target['source']]}: no reference and no holdout says what a model that "
            "never saw the forget set would reach."
        )
    if metrics["sparsity"] == 0:
        sentences.append(
            "Nothing was cut: the forget loss alone did this, and what is only suppressed comes back easily."
        )
    if not metrics.get("bystander"):
        sentences.append("There was no bystander set: what the model knew outside both sets may be damaged, unseen.")
    return sentences


# --- page -------------------------------------------------------------------------------------------------------------


def write_report(folder: Path) -> Path:
    """Write report.html, one page that needs no other file, from a finished run's files; return its path."""
    metrics = _read_json(folder / "metrics.json")
    if metrics is None:
        raise UserError(
            f"{folder} holds no finished run: metrics.json is not there.",
            "the report is made of the run's results.",
            "start the run's command again; it goes on where it was stopped.",
        )
    page = _environment().get_template("report.html.jinja").render(_page_values(folder, metrics))
    path = folder / "report.html"
    write_text(path, page)
    return path


def _environment() -> Environment:
    loader = PackageLoader("loraprune", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _page_values(folder: Path, metrics: Values) -> dict[str, Any]:
    asked = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    decision, reproduce = _read_json(folder / "decision.json"), _read_json(folder / "reproduce.json")
    rows = result_rows(metrics)
    return {
        "title": f"{'Unlearning' if metrics.get('forget') else 'Compression'}: {local_name(asked.get('model', ''))}",
        "asked": _asked(asked),
        "target": _target_words(metrics.get("target")),
        "columns": _used_columns(rows),
        "rows": rows,
        "outcome": outcome_text(metrics),
        "goal_met": metrics["goal_met"],
        "cost": _cost_words(metrics),
        "form": _form_words(metrics),
        "figure": base64.b64encode(figure_bytes(metrics, read_events(folder / "events.jsonl"))).decode(),
        "removed": removed_by_layer(decision, metrics["model"]["groups"]) if decision else {},
        "ended_by": ENDINGS.get(decision["ended_by"], decision["ended_by"]) if decision else "",
        "reproduce": json.dumps(without_folders(reproduce), indent=2, ensure_ascii=False) if reproduce else "",
        "limits": limits(metrics),
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _asked(values: Values) -> list[tuple[str, str, str]]:
    """Return name, value and sentence of every setting that is not its default."""
    fields = Settings.__dataclass_fields__
    return [(name, words, fields[name].metadata["text"]) for name, words in changed_settings(values).items()]


def _target_words(target: Values | None) -> str:
    if target is None:
        return ""
    low, high = band_texts(target)
    source = TARGET_SOURCES.get(target["source"], target["source"])
    return f"The target was P(forget) {number_text(target['performance'])}: {source}. The band is {low} .. {high}."


def _cost_words(metrics: Values) -> str:
    parts = []
    if total := (metrics.get("seconds") or {}).get("total"):
        parts.append(f"took {duration_text(total)}")
    if memory := metrics.get("peak_memory_bytes"):
        parts.append(f"needed {memory / 1e9:.2f} GB of memory at the peak")
    return f"The run {' and '.join(parts)}." if parts else ""


@dataclass(frozen=True)
class LayerRemovals:
    """What went in one layer: groups of one kind, of how many, and their mean share (None where not scored)."""

    layer: int
    removed: int
    of: int
    share: float | None


def removed_by_layer(decision: Values, groups: Values) -> dict[str, list[LayerRemovals]]:
    """Return a line a layer for each kind; `groups`: how many of each kind the model had."""
    layers = decision["removals"]["layer"]
    lengths = [len(one) for one in decision.get("kept_by_layer", {}).values()]
    depth = max([*lengths, *(layer + 1 for layer in layers)], default=1)
    return {
        kind: [_removed_in(layer, kind, pair["before"] // depth, decision["removals"]) for layer in range(depth)]
        for kind, pair in groups.items()
    }


def _removed_in(layer: int, kind: str, of: int, removals: Values) -> LayerRemovals:
    places = zip(removals["layer"], removals["kind"], strict=True)
    chosen = [number for number, place in enumerate(places) if place == (layer, kind)]
    shares = [share for number in chosen if (share := removals["share"][number]) is not None]
    return LayerRemovals(layer, len(chosen), of, sum(shares) / len(shares) if shares else None)


# --- model card -------------------------------------------------------------------------------------------------------


def model_card(values: Values, metrics: Values) -> str:
    """Return README.md of the written checkpoint: results, the settings that made it, how to load it, limits."""
    name = local_name(str(values.get("model", "")))
    parts = (
        _front_matter(str(values.get("model", "")), metrics),
        f"# {name}, {'unlearned' if metrics.get('forget') else 'pruned'} with loraprune",
        _introduction(metrics),
        f"## Results\n\n{_markdown_results(metrics)}\n\n**{outcome_text(metrics)}**",
        f"## Load it\n\n{_loading(metrics['model'].get('form', 'stock'))}",
        f"## Settings that made it\n\nAll others are loraprune's defaults.\n\n{_markdown_settings(values)}",
        "## Limits\n\n" + "\n".join(f"- {one}" for one in limits(metrics)),
    )
    return "\n\n".join(parts) + "\n"


def _front_matter(model: str, metrics: Values) -> str:
    tags = ["loraprune", "pruned", *(["unlearning"] if metrics.get("forget") else [])]
    lines = ["library_name: transformers", f"tags: {json.dumps(tags)}"]
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model) and not Path(model).exists():
        lines.insert(0, f"base_model: {json.dumps(model)}")
    return "\n".join(["---", *lines, "---"])


def _introduction(metrics: Values) -> str:
    removed = percent(metrics["sparsity"])
    if not metrics.get("forget"):
        return f"{removed} of the parameters were cut out: the groups that the data's loss depends on least."
    return (
        f"{removed} of the parameters were cut out: attention groups and feed-forward channels that serve the forget "
        "set and not the retain set. The rest was repaired on the retain set. P(set) is the mean over rows of "
        "exp(-mean negative log-likelihood of the answer's tokens); retention is P after / P before."
    )


def _markdown_results(metrics: Values) -> str:
    rows = result_rows(metrics)
    columns = _used_columns(rows)
    lines = [["", *columns], ["---", *("---:" for _ in columns)]]
    lines += [[row.name, *(getattr(row, name) for name in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _loading(form: str) -> str:
    trust = ", trust_remote_code=True" if form == "per_layer" else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("this/folder"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("this/folder"{trust})',
        "```",
    ]
    return "\n".join([*lines, *(OWN_CODE if form == "per_layer" else ())])


def _markdown_settings(values: Values) -> str:
    lines = [f"| {name} | `{words.replace('|', chr(92) + '|')}` |" for name, words in changed_settings(values).items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])
