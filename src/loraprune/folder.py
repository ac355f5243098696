"""Folder: a run on disk, in one process at a time; every file is written under a temporary name and renamed.

Reads    a run's folder, if an earlier start left one
Gives    RunFolder, write_text, write_bytes, write_json
Source   -
Symbols  -
"""

import json
import os
import platform
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout

from loraprune.errors import UserError
from loraprune.events import read_events
from loraprune.launch import here
from loraprune.processes import all_do, first_does
from loraprune.setting import flag, value_text
from loraprune.settings import Settings, as_values
from loraprune.settings_file import settings_from

WRITTEN = ("events.jsonl", "decision.json", "mask.safetensors", "adapter", "model", "metrics.json", "report.html")
BEFORE_TRAINING = ("config.toml", "inputs.json", "before.json", "original.json", "quantised.json", "events.jsonl")
LOCK, OWNER = "run.lock", "owner.json"  # the kernel frees the lock of a process that ended, however it ended
PATIENCE = 1.0  # seconds: long enough for an owner to leave its name, and for one that ends to let go
CHANGEABLE = ("output", "show_examples", "report_to")  # these alter nothing that a run decides


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, whatever ends the process or the machine."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.replace(path)


def _sync(path: Path) -> None:
    """Have a file or a folder's list of names on the disk: else a rename may get there before what it renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    for one in (*temporary.rglob("*"), temporary):
        _sync(one)
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
            said = tomllib.loads(config.read_text(encoding="utf-8"))
            older = {"order": "share", "relearning_radius": 0.0}  # of runs from before there were these settings
            before = older if "forget" in said else {}
            if "forget" not in said:
                said.pop("forget_loss_beta", None)  # which compression has no use for, and whose default was another
            self._refuse_changed(settings_from({**before, **said}))
        elif self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file.", "a run is a folder.", "choose another --output.")
        elif found := [name for name in WRITTEN if (self.path / name).exists()]:
            raise UserError(
                f"{self.path} holds {found[0]}, but no run that could go on.",
                "files of something else would be overwritten.",
                "choose another --output, or empty that folder.",
            )

    @property
    def finished(self) -> bool:
        """Whether the run is over and nothing is left to tidy; then nobody writes here any more."""
        found = {name for name in ("metrics.json", "report.html", "state", LOCK, OWNER) if (self.path / name).exists()}
        return found == {"metrics.json", "report.html"}

    @contextmanager
    def held(self, say: Callable[[str], Any]) -> Iterator[None]:
        """Keep every other process out of the folder while the block runs; a finished run needs no lock.

        Raises UserError with the name of the process that holds it; `say` gets a line about one that was killed here.
        Of several processes that work as one the first holds it for all.
        """
        with ExitStack() as stack:
            first_does(lambda: stack.enter_context(self._held(say)))
            self._refuse_unshared()
            yield

    def _refuse_unshared(self) -> None:
        """Raise UserError in all processes where one of them sees another folder than the one that the first holds."""
        owner = first_does(lambda: self.read(OWNER))

        def look() -> None:
            if not self.path.is_dir() or self.read(OWNER) != owner:
                raise UserError(
                    f"{self.path} of the first process is not there on {platform.node()}.",
                    "every process reads the written model again, to measure it.",
                    "choose an --output that all machines of the launch share.",
                )

        all_do(look)

    @contextmanager
    def _held(self, say: Callable[[str], Any]) -> Iterator[None]:
        if self.finished:
            yield
            return
        made = not self.path.exists()
        self._make()
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise self._in_use() from None
        try:
            self.check()  # another process may have begun, and ended, since this one looked
            self._sign(say)
            yield
        finally:
            (self.path / OWNER).unlink(missing_ok=True)
            (self.path / LOCK).unlink(missing_ok=True)  # while it is held: nobody may wait on a name that goes
            lock.release()
            if made and not any(self.path.iterdir()):
                self.path.rmdir()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the folder {self.path} cannot be made: {error.strerror}.",
                "a run writes its state, its evidence and the model there.",
                "choose another --output.",
            ) from None

    def _sign(self, say: Callable[[str], Any]) -> None:
        """Leave this process's name, having said whose name was left by a kill."""
        if (earlier := self.read(OWNER)) is not None:
            say(f"{_name_of(earlier)} ended without finishing; the run goes on where it was")
        since = datetime.now().strftime("%Y-%m-%d %H:%M")
        write_json(self.path / OWNER, {"process": os.getpid(), "host": platform.node(), "since": since})

    def _in_use(self) -> UserError:
        owner = self.read(OWNER)
        return UserError(
            f"{self.path} is in use by {'another process' if owner is None else _name_of(owner)}.",
            "two processes in one run's folder would overwrite each other's files.",
            "wait for that process or end it, then give the same command; or choose another --output.",
        )

    def open(self) -> None:
        """Take up the run in the folder, or begin one; an event that a kill cut short is dropped."""
        first_does(self._open)

    def _open(self) -> None:
        write_text(self.path / "config.toml", tomli_w.dumps(as_values(self.settings)))
        log = self.path / "events.jsonl"
        if log.exists() and not (content := log.read_bytes()).endswith(b"\n"):
            write_bytes(log, content[: content.rfind(b"\n") + 1])

    @contextmanager
    def withdrawn_if_refused(self) -> Iterator[None]:
        """Take back what the block wrote where it refuses the run, with a UserError, before anything was trained."""
        try:
            yield
        except UserError:
            if here().first and not any((self.path / name).exists() for name in ("state", "model")):
                for name in BEFORE_TRAINING:
                    (self.path / name).unlink(missing_ok=True)
            raise

    def _refuse_changed(self, before: Settings) -> None:
        names = [name for name in before.changed(self.settings) if name not in CHANGEABLE]
        if not names:
            return
        changes = ", ".join(
            f"{name} was {value_text(getattr(before, name))}, now {value_text(getattr(self.settings, name))}"
            for name in names
        )
        raise UserError(
            f"{self.path} holds a run with other settings: {changes}.",
            "going on would mix two runs, and the evidence would belong to neither.",
            f"use the old value of {', '.join(map(flag, names))}, or choose another --output.",
        )

    def read(self, name: str) -> Any:
        """Return the content of a JSON file of the folder, None where there is none."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def has(self, name: str) -> bool:
        """Say whether the folder holds a file or a folder, as the first process sees it."""
        return first_does(lambda: (self.path / name).exists())

    def events(self) -> list[dict[str, Any]]:
        """Return every event so far; a last line that a kill cut short is left out."""
        return read_events(self.path / "events.jsonl")

    def drop_events_after(self, step: int) -> None:
        """Forget events of steps that a resumed run takes again; -1: of all, the very first look included."""
        if not here().first:
            return
        kept = [one for one in self.events() if one.get("step", -1) <= step]
        write_text(self.path / "events.jsonl", "".join(json.dumps(one) + "\n" for one in kept))

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to events.jsonl; a number that is not finite stands there as text, "nan" or "inf".

        Only the first of several processes writes it.
        """
        if not here().first:
            return
        line = {"event": kind, "seconds": round(time.monotonic() - self.started, 3), **_told(values)}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def stored(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the content of a JSON file of the folder, making and writing it first when it is not there.

        All processes make it, and the first one's is written and returned in all of them.
        """
        if (value := first_does(lambda: self.read(name))) is None:
            made = make()
            value = first_does(lambda: self._written(name, made))
        return value

    def _written(self, name: str, value: Any) -> Any:
        write_json(self.path / name, value)
        return value


def _name_of(owner: Mapping[str, Any]) -> str:
    return f"process {owner['process']} on {owner['host']} since {owner['since']}"
