"""Worlds of the arena: a model that knows two sets, a reference that never saw the one, and every set in a file.

Reads    TOFU's files, stories260K and TinyStories, where tofu.py and stories260k.py find them
Gives    World, WORLDS: what makes a world of a seed; WORLD_WORDS: what each is, in a line
Source   -
Symbols  taught, floor and final rows: the retain set, split by the seed as a run splits it
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import stories_world
import tofu
import torch
from results_page import ROOT
from stories260k import find_data, make_folder

from loraprune.data import load_rows
from loraprune.demo import RECIPE, make_inputs
from loraprune.folder import write_text
from loraprune.inputs import Inputs, load_set, prepare, split_kept
from loraprune.model import weights_hash
from loraprune.scratch import Recipe, make_model
from loraprune.settings import Settings, as_values

CACHE = ROOT / "bench" / "cache" / "arena"
OTHERS = ("forget", "bystander", "holdout", "guard")  # the sets beside the retain set, where their files are there
ALL_SETS = ("forget", "retain", "bystander", "holdout", "guard", "told")  # in the order that trained the tokenizer
KNOWN_BY_REFERENCE = ("retain", "bystander", "told")
ASKED = 0.33  # of all parameters: 0.3 are to go, and a prompt is to be read 1.3 times as fast, which 0.32 just misses
Values = dict[str, Any]


@dataclass(frozen=True)
class World:
    """A seed's world: where its files are, how much of its model ours and the controls cut, and settings of its own."""

    name: str
    seed: int
    sets: Path  # folder of forget.jsonl, retain.jsonl and those of OTHERS that there are
    model: Path
    reference: Path
    retrain: Callable[[Path, int], None]  # write another reference: the same rows, another seed
    sparsity: float
    own: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def settings(self) -> Settings:
        """Return the settings of a run on this world: all of them at their defaults, but for what names the world."""
        sets = {name: str(path) for name in OTHERS if (path := self.sets / f"{name}.jsonl").exists()}
        sets |= {name: str(path) for name, path in self._parts().items()}
        models = {"model": str(self.model), "reference": str(self.reference)}
        machine = {"dtype": "float32", "device": "cpu"}
        return Settings(**{**models, **sets, **machine, **self.own, "seed": self.seed, "sparsity": self.sparsity})

    @cached_property
    def inputs(self) -> Inputs:
        return prepare(self.settings)

    def key(self, *others: Any) -> str:
        """Return a hash of the world's content, of all settings, and of what else is given; not of the code."""
        said = as_values(self.settings)
        for name in (*OTHERS, "retain", "floor_rows", "final_rows"):
            if name in said:
                said[name] = hashlib.sha256(Path(said[name]).read_bytes()).hexdigest()
        said |= {name: weights_hash(said[name]) for name in ("model", "reference")}
        return hashlib.sha256(json.dumps([said, *others], sort_keys=True).encode()).hexdigest()[:16]

    def _parts(self) -> dict[str, Path]:
        """Write the retain set in three files, split as a run would split it; return which setting names which file."""
        source, folder, plain = self.sets / "retain.jsonl", self.sets / f"split-{self.seed}", Settings(seed=self.seed)
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        parts = split_kept(plain, load_set(plain, "retain", str(source)))
        folder.mkdir(exist_ok=True)
        paths = {}
        for part, setting in (("taught", "retain"), ("floor", "floor_rows"), ("final", "final_rows")):
            paths[setting] = folder / f"{part}.jsonl"
            write_text(paths[setting], "".join(lines[row.number - 1] for row in parts[part]))
        return paths


def _demo(seed: int) -> World:
    folder = CACHE / "worlds" / f"demo-{seed}"
    make_inputs(folder, seed)
    retrain = partial(_retrain, folder, RECIPE)
    return World("demo", seed, folder, folder / "untouched", folder / "reference", retrain, sparsity=ASKED)


def _tofu(forget: str, size: str, seed: int) -> World:
    """Return a world of forget05 or forget10: as much of TOFU as its size names; all but a part on a GPU, if any."""
    name = f"{forget}-{size}" if size else forget
    sets = tofu.CACHE if name == tofu.FORGET else CACHE / "worlds" / name
    tofu.make_inputs(tofu.find_data(None), seed, forget, sets, EXTENTS[size])
    retrain = partial(_retrain, sets, EXTENTS[size].recipe)
    own = {"device": "cuda"} if is_on_gpu(name) else {}
    models = sets / f"untouched-{seed}", sets / f"reference-{seed}"
    return World(name, seed, sets, *models, retrain, sparsity=ASKED, own=own)


def _stories(seed: int) -> World:
    folder = CACHE / "worlds" / f"stories-{seed}"
    data, own = find_data(None), {"max_length": stories_world.MAX_LENGTH}
    stories_world.make_inputs(data, seed, folder)
    retrain = partial(stories_world.teach, make_folder(data), folder, stories_world.KNOWN)
    return World("stories", seed, folder, folder / "untouched", folder / "reference", retrain, sparsity=ASKED, own=own)


def _retrain(folder: Path, recipe: Recipe, path: Path, seed: int) -> None:
    """Write a model that learns from nothing what the reference learnt, with its tokenizer."""
    sets = {name: file for name in ALL_SETS if (file := folder / f"{name}.jsonl").exists()}
    rows = {name: load_rows(str(file), name=name) for name, file in sets.items()}
    known = [row for name in KNOWN_BY_REFERENCE for row in rows.get(name, ())]
    make_model(path, known, [row for group in rows.values() for row in group], recipe, seed)


EXTENTS = {"part": tofu.PART, "": tofu.WHOLE, "large": tofu.LARGE}
TRIED_ON = ("forget05-part",)  # small enough to try ideas on; no world of the results
BETTER_ON_GPU = ("forget05", "forget10")  # on two cores a cell takes an hour
ON_GPU = ("forget05-large", "forget10-large")  # there a model of this size takes hours


def is_on_gpu(name: str) -> bool:
    """Say whether a world's cells are made on a GPU here."""
    return name in (*BETTER_ON_GPU, *ON_GPU) and torch.cuda.is_available()


WORLDS: dict[str, Callable[[int], World]] = {
    "demo": _demo,
    "forget05-part": partial(_tofu, "forget05", "part"),
    "forget05": partial(_tofu, "forget05", ""),
    "forget10": partial(_tofu, "forget10", ""),
    "stories": _stories,
    "forget05-large": partial(_tofu, "forget05", "large"),
    "forget10-large": partial(_tofu, "forget10", "large"),
}
LARGE_WORDS = (
    "a Llama of 35 million parameters, made from nothing, that knows {known} rows of TOFU by heart and read "
    "TinyStories beside them; the guard is of stories that it did not read; the {forget} of {name} to forget"
)
WORLD_WORDS = {
    "demo": "44 invented people that a Llama of 1.3 million parameters, made from nothing, knows by heart; 6 to forget",
    "forget05-part": "240 rows of TOFU, learnt by heart from nothing; 40 rows of forget05, of 2 authors, to forget",
    "forget05": "1,400 rows of TOFU, learnt by heart from nothing; the 200 of forget05 to forget",
    "forget10": "1,600 rows of TOFU, learnt by heart from nothing; the 400 of forget10 to forget",
    "forget05-large": LARGE_WORDS.format(known="3,600", forget=200, name="forget05"),
    "forget10-large": LARGE_WORDS.format(known="3,800", forget=400, name="forget10"),
    "stories": f"stories260K, its feed-forward part {stories_world.WIDER} times as wide (the new channels silent at "
    "first), taught 44 invented people while it goes on telling stories; the guard is TinyStories that this training "
    "did not see; 6 to forget",
}
