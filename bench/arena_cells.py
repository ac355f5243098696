"""Cells of the arena: each is made and measured in a process of its own, several at once where asked.

Reads    worlds; what earlier calls left in bench/cache/arena, or in the results
Gives    Cell, End, fill: makes what is missing; made_worlds; put_back and take_out: cells from the results
Source   -
Symbols  MiB = 2^20 bytes; peak = the most memory that a process ever held, its libraries and mapped files too
"""

import hashlib
import json
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic

import psutil
import torch
from arena_contestants import CONTESTANTS
from arena_marks import marks_key, measure_marks
from arena_worlds import CACHE, WORLDS, Values, World

from loraprune.attacked import Role
from loraprune.cache import program_identity
from loraprune.folder import write_json
from loraprune.memory import peak_bytes
from loraprune.model import quiet_libraries

NEW = get_context("spawn")
MIB = 2**20
MADE = "made.json"
# what made.json holds beside the contestant's name
SPENT = ("point", "machine", "source", "seconds", "before_mib", "peak_mib", "jobs", "outcome")
SHOWN_OF_HASH = 8  # hexadecimal digits that tell one source from another
MAKERS = ("adamw", "arena_cells", "arena_contestants", "arena_marks", "arena_rivals", "speed")  # beside the product


# --- what is made -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a world whose marks are measured once; a new process is told it as it stands here."""

    world: World
    role: Role

    @cached_property
    def folder(self) -> Path:
        return CACHE / f"{self.world.name}-{self.world.seed}" / self.world.key(*self.told())

    @property
    def model(self) -> Path:
        raise NotImplementedError

    def told(self) -> Sequence[object]:
        """Return what tells it from the world's other checkpoints."""
        raise NotImplementedError

    @property
    def marks_path(self) -> Path:
        return self.folder / f"marks-{marks_key(self.world.settings)}.json"

    def is_full(self) -> bool:
        return self.marks_path.exists()

    def marks(self) -> Values:
        return read(self.marks_path)

    def make(self, jobs: int) -> None:
        """Write the checkpoint, where it is not there yet."""


class End(Checkpoint):
    """One of the models that a world begins with: its role is original or reference."""

    @property
    def model(self) -> Path:
        settings = self.world.settings
        return Path(settings.model if self.role == "original" else str(settings.reference))

    def __str__(self) -> str:
        return f"{self.world.name} {self.world.seed}: marks of the {self.role}"

    def told(self) -> Sequence[object]:
        return (self.role,)


@dataclass(frozen=True)
class Cell(Checkpoint):
    """One point of one contestant on one seed of one world."""

    contestant: str
    point: Values

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def told(self) -> Sequence[object]:
        return (self.contestant, self.point)

    @property
    def made_path(self) -> Path:
        return self.folder / MADE

    def is_full(self) -> bool:
        return self.made_path.exists() and super().is_full()

    def __str__(self) -> str:
        return f"{self.world.name} {self.world.seed}: {self.contestant} {self.point}"

    def made(self) -> Values:
        """Return what making it took: seconds, peak_mib, before_mib of it before anything was made, jobs at once; on
        what machine, by which source; how the run ended, None where it was none of the product's."""
        return {"outcome": _outcome(self.folder), **read(self.made_path)}

    def known_by(self) -> Values:
        """Return the names under which `put_back` finds a cell and its marks again."""
        return {"key": self.folder.name, "marks_key": self.marks_path.stem}

    def make(self, jobs: int) -> None:
        """Write the checkpoint and, last, what it took: without that it is no cell, and is made anew."""
        if self.made_path.exists() and self.model.exists():
            return
        print(self, flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        _ = self.world.inputs  # what every contestant reads is no part of making one
        known = {"contestant": self.contestant, "point": self.point, "machine": machine_of(self.world)}
        known |= {"source": source()}  # before the code can change under a cell that takes long
        before, begun = peak_mib(), monotonic()
        CONTESTANTS[self.contestant].make(self.world, self.point, self.folder)
        spent = {"seconds": round(monotonic() - begun, 1), "before_mib": before, "peak_mib": peak_mib(), "jobs": jobs}
        write_json(self.made_path, {**known, **spent, "outcome": _outcome(self.folder)})


def _outcome(folder: Path) -> str | None:
    """Return how a run of the product ended; cells made before it was kept have it in their run's numbers alone."""
    numbers = folder / "metrics.json"
    return read(numbers)["outcome"] if numbers.exists() else None


def read(path: Path) -> Values:
    return json.loads(path.read_text(encoding="utf-8"))


def peak_mib() -> float:
    """Return this process's peak of main memory in MiB."""
    return round(peak_bytes() / MIB, 1)


def source() -> str:
    """Return a short hash of the code that makes and measures a cell: the product's, and the bench's own."""
    digest = hashlib.sha256(program_identity()["source"].encode())
    for name in MAKERS:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:SHOWN_OF_HASH]


def machine_of(world: World) -> str:
    """Return what this machine makes the world's cells on."""
    cores = f"{psutil.cpu_count()} cores"
    return f"one {torch.cuda.get_device_name()}, {cores}" if world.settings.device == "cuda" else cores


def is_gpu(machine: str) -> bool:
    """Say whether a machine that `machine_of` named is a GPU."""
    return machine.startswith("one ")


# --- making it --------------------------------------------------------------------------------------------------------


def made_worlds(seeds: Mapping[str, Sequence[int]], jobs: int) -> dict[str, dict[int, World]]:
    """Return the worlds of these seeds; what is missing of them is made first, each world's seeds one after the other,
    for they may share files."""
    in_processes({f"world {name}": partial(_make_world, name, one) for name, one in seeds.items()}, jobs)
    worlds = {name: {seed: WORLDS[name](seed) for seed in one} for name, one in seeds.items()}
    for world in (world for of_seeds in worlds.values() for world in of_seeds.values()):
        _ = world.settings  # writes the split; the processes get it with the world, and write none themselves
    return worlds


def _make_world(name: str, seeds: Sequence[int]) -> None:
    with quiet_libraries():
        for seed in seeds:
            WORLDS[name](seed)


def put_back(name: str, world: Values) -> None:
    """Write what the results hold of a world's cells where `fill` looks for them, without their models.

    A cell stands under the hash of its content, so one of other models, rows or settings is not taken for it. Cells
    without a key, from before the results held one, stay where they are. The code is in no key: a cell says its source.
    """
    for contestant, one in world["contestants"].items():
        for cell in (cell for cell in [*one["tried"], *one["cells"]] if "key" in cell):
            folder = CACHE / f"{name}-{cell['seed']}" / cell["key"]
            if not (folder / MADE).exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a call left that was ended half-way
                folder.mkdir(parents=True)
                write_json(folder / f"{cell['marks_key']}.json", cell["marks"])
                write_json(folder / MADE, {"contestant": contestant, **{part: cell.get(part) for part in SPENT}})


def take_out(name: str, seeds: Sequence[int], contestants: Sequence[str]) -> None:
    """Remove these contestants' cells of a world that other code made, or that have no model here."""
    for made in (made for seed in seeds for made in (CACHE / f"{name}-{seed}").glob(f"*/{MADE}")):
        if (known := read(made))["contestant"] not in contestants:
            continue
        if not made.with_name("model").exists() or known.get("source") != source():
            shutil.rmtree(made.parent)


def fill(checkpoints: Sequence[Checkpoint], jobs: int) -> None:
    """Make and measure what is not there yet, `jobs` at once, each in a process of its own."""
    in_processes({str(one): partial(_fill, one, jobs) for one in checkpoints if not one.is_full()}, jobs)


def _fill(one: Checkpoint, jobs: int) -> None:
    with quiet_libraries():
        one.make(jobs)
        one.folder.mkdir(parents=True, exist_ok=True)
        write_json(one.marks_path, measure_marks(one.world, str(one.model), one.role))


def in_processes(tasks: Mapping[str, Callable[[], None]], jobs: int) -> None:
    """Run every task in a new process, `jobs` at once, in their order; each is known by a name.

    However this ends, no process is left, not after Ctrl-C either, which only this process hears. A task that fails
    does not keep the others from their end: then the call ends and names those that failed.
    """
    waiting, running, failed = deque(tasks), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.popleft()
                with _deaf():
                    process = NEW.Process(target=tasks[name])
                    process.start()
                    running[name] = process
            wait([one.sentinel for one in running.values()])
            for name in [name for name, one in running.items() if not one.is_alive()]:
                if code := running.pop(name).exitcode:
                    failed.append(f"{name} (exit code {code})")
    finally:
        for one in running.values():
            one.terminate()
        for one in running.values():
            one.join()
    if failed:
        raise SystemExit(
            f"Not made: {', '.join(failed)}\n  why: what each of them said stands above\n"
            "  fix: call again; what was made is kept"
        )


@contextmanager
def _deaf() -> Iterator[None]:
    """Ignore Ctrl-C inside this block, and for good in processes that begin there."""
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heard)
