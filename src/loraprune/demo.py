"""Demo: a whole run on a world of the program's own, from invented people to a smaller model that forgot six of them.

Reads    a seed
Gives    a run folder that also holds the data files, the untouched model and the reference
Source   -
Symbols  -
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loraprune.data import encode, load_rows
from loraprune.errors import UserError
from loraprune.folder import whole_folder, write_text
from loraprune.model import quiet_libraries
from loraprune.pipeline import run
from loraprune.records import RunReport
from loraprune.scratch import learn_by_heart, make_llama, train_tokenizer
from loraprune.settings import Settings
from loraprune.world import make_world

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
VOCABULARY = 640
EPOCHS = 18
SETTINGS: dict[str, Any] = {"sparsity": 0.3, "learning_rate": 1e-3, "dtype": "float32", "device": "cpu"}


def run_demo(folder: Path, seed: int, show_examples: bool = True, console: Console | None = None) -> RunReport:
    """Make the world and both models (once), then run `unlearn` on them as a user would, and return its report."""
    console = console or Console()
    with quiet_libraries():
        make_inputs(folder, seed)
    settings = Settings(
        model=str(folder / "untouched"),
        reference=str(folder / "reference"),
        output=str(folder),
        **{name: str(folder / f"{name}.jsonl") for name in ("forget", "retain", "bystander", "holdout")},
        seed=seed,
        show_examples=show_examples,
        **SETTINGS,
    )
    return run(settings, console)


def make_inputs(folder: Path, seed: int, epochs: int = EPOCHS) -> None:
    """Write the four data files, the untouched model and the reference, whichever are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world(seed)
    for name, rows in world.items():
        _write_rows(folder / f"{name}.jsonl", rows)
    known = {name: folder / f"{name}.jsonl" for name in ("retain", "bystander", "forget")}
    _make_model(folder / "untouched", list(known.values()), world, seed, epochs)
    _make_model(folder / "reference", [known["retain"], known["bystander"]], world, seed, epochs)


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{path} holds the world of another seed.",
            "models and data of two worlds would be mixed.",
            "choose another --output, or remove that folder.",
        )
    write_text(path, text)


def _make_model(path: Path, files: Sequence[Path], world: dict[str, Any], seed: int, epochs: int) -> None:
    if path.exists():
        return
    rows = [row for file in files for row in load_rows(str(file), name=file.stem)]
    texts = (f"Question: {row['question']}\nAnswer: {row['answer']}" for group in world.values() for row in group)
    tokenizer = train_tokenizer(texts, VOCABULARY)
    model = make_llama(tokenizer, seed, **SIZES)
    examples = encode(rows, tokenizer, name="demo")
    with whole_folder(path) as part:
        learn_by_heart(
            model,
            examples,
            epochs=epochs,
            batch_size=64,
            learning_rate=3e-3,
            seed=seed,
            title=f"learn {path.name}",
            scratch_folder=part / "logs",
        )
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
