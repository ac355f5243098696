"""Folder: a run on disk; every file is written under a temporary name and renamed.

Reads    a run's folder, if an earlier start left one
Gives    RunFolder, write_text, write_bytes, write_json
Source   -
Symbols  -
"""

import json
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import tomli_w

from loraprune.errors import UserError
from loraprune.settings import Settings, as_values, flag, settings_from

WRITTEN = ("events.jsonl", "decision.json", "mask.safetensors", "adapter", "model", "metrics.json", "report.html")
BEFORE_TRAINING = ("config.toml", "inputs.json", "before.json", "original.json", "events.jsonl")
CHANGEABLE = ("output", "show_examples", "report_to")  # these alter nothing that a run decides


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or nothing."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a whole JSON file or nothing, one top-level key a line; NaN is an error, since JSON has none."""
    lines = [f" {json.dumps(name)}: {json.dumps(one, allow_nan=False)}" for name, one in value.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the name `path` when the block ends well, and vanishes otherwise.

    A kill at any moment leaves the old folder or the new one, under `path` or, between two renames, under the name
    from which `settled` takes it back.
    """
    temporary, old = path.with_name(path.name + ".part"), _aside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
    temporary.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def settled(path: Path) -> Path:
    """Return `path` after taking back what a kill left aside while the folder was replaced."""
    if not path.exists() and _aside(path).exists():
        _aside(path).replace(path)
    return path


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _told(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers that are not finite as text."""
    if isinstance(value, Mapping):
        return {name: _told(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_told(one) for one in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


class RunFolder:
    """A run's folder: settings, events and finished stages."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.started = time.monotonic()

    def check(self) -> None:
        """Raise UserError when the folder holds a run with other settings, or something that is no run."""
        config = self.path / "config.toml"
        if config.exists():
            self._refuse_changed(settings_from(tomllib.loads(config.read_text(encoding="utf-8"))))
        elif self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file.", "a run is a folder.", "choose another --output.")
        elif found := [name for name in WRITTEN if (self.path / name).exists()]:
            raise UserError(
                f"{self.path} holds {found[0]}, but no run that could go on.",
                "files of something else would be overwritten.",
                "choose another --output, or empty that folder.",
            )

    def open(self) -> None:
        """Make the folder, or take up the run in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.toml", tomli_w.dumps(as_values(self.settings)))

    def withdraw(self) -> None:
        """Take back what a run wrote that was refused before it trained anything."""
        if (self.path / "state").exists() or (self.path / "model").exists():
            return
        for name in BEFORE_TRAINING:
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _refuse_changed(self, before: Settings) -> None:
        names = [name for name in before.changed(self.settings) if name not in CHANGEABLE]
        if not names:
            return
        changes = ", ".join(f"{name} was {getattr(before, name)}, now {getattr(self.settings, name)}" for name in names)
        raise UserError(
            f"{self.path} holds a run with other settings: {changes}.",
            "going on would mix two runs, and the evidence would belong to neither.",
            f"use the old value of {flag(names[0])}, or choose another --output.",
        )

    def read(self, name: str) -> Any:
        """Return the content of a JSON file of the folder, None where there is none."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def events(self) -> list[dict[str, Any]]:
        """Return every event so far; a last line that a kill cut short is left out."""
        path = self.path / "events.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def drop_events_after(self, step: int) -> None:
        """Forget events of steps that a resumed run takes again."""
        kept = [one for one in self.events() if one.get("step", 0) <= step]
        write_text(self.path / "events.jsonl", "".join(json.dumps(one) + "\n" for one in kept))

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to events.jsonl; a number that is not finite stands there as text, "nan" or "inf"."""
        line = {"event": kind, "seconds": round(time.monotonic() - self.started, 3), **_told(values)}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def stored(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the content of a JSON file of the folder, making and writing it first when it is not there."""
        if (value := self.read(name)) is None:
            write_json(self.path / name, value := make())
        return value
