"""Examples: a few prompts with the answers before and after, for the eye; on the terminal only, never in a file.

Reads    the run's rows, the untouched and the written model
Gives    printed text
Source   -
Symbols  -
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraprune.data import Row, prompt_ids
from loraprune.generation import end_tokens, generate
from loraprune.inputs import Inputs
from loraprune.model import load_model, pad_token_id
from loraprune.settings import Settings

COUNT = 3
NEW_TOKENS = 48


def show_examples(settings: Settings, inputs: Inputs, model: Path, console: Console) -> None:
    """Print prompts of the forget set and the retain set's final rows with both models' greedy answers."""
    chosen = {name: _spread(inputs.rows[name]) for name in ("forget", "final") if name in inputs.rows}
    answers = [
        {name: _answers(load_model(source, settings), rows, settings, inputs) for name, rows in chosen.items()}
        for source in (settings.model, str(model))
    ]
    for name, rows in chosen.items():
        table = Table(
            "prompt", "before", "after", title=f"{name} set" if name == "forget" else "retain set, final rows"
        )
        for row, before, after in zip(rows, answers[0][name], answers[1][name], strict=True):
            table.add_row(*(Text(one) for one in (row.prompt, before, after)))
        console.print(table)


def _spread(rows: Sequence[Row]) -> list[Row]:
    """Return a few rows with a prompt, from all over the set."""
    asked = [row for row in rows if row.messages]
    return asked[:: max(1, len(asked) // COUNT)][:COUNT]


def _answers(model: Any, rows: Sequence[Row], settings: Settings, inputs: Inputs) -> list[str]:
    prompts = [prompt_ids(row, inputs.tokenizer, template=settings.template) for row in rows]
    options: dict[str, Any] = {"pad_token_id": pad_token_id(inputs.tokenizer), "max_new_tokens": NEW_TOKENS}
    options["end_token_ids"] = end_tokens(model, inputs.tokenizer)
    answers = [one for [one] in generate(model, prompts, batch_size=COUNT, **options)]
    return [cast(str, inputs.tokenizer.decode(one, skip_special_tokens=True)).strip() for one in answers]
