"""Cache: what was measured, kept by the content of what it was measured on; never a word of a row.

Reads    a folder of small JSON files, each named by the hash of its identity
Gives    Cache, content_hash, cache_folder, checkpoint_identity, program_identity
Source   -
Symbols  identity = hashes of weights and rows, the settings that change numbers, versions
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from math import isnan, nan
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from loraprune.errors import UserError
from loraprune.folder import write_json

Columns = dict[str, list[float]]  # a number a row under each name; NaN where a row has none
COUNTED_BY = ("loraprune", "torch", "transformers", "tokenizers", "rouge-score", "nltk")  # nltk stems for ROUGE
CONTENT = (
    ".json",
    ".jinja",
    ".model",
    ".py",
    ".safetensors",
    ".txt",
)  # what of a checkpoint's files its answers depend on


class Cache:
    """Columns of numbers, each made once; a folder of None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        """Make the folder; raise UserError where nothing can be written there, before hours of measuring are lost."""
        self.folder = folder
        if folder is not None:
            _refuse_unwritable(folder)

    def kept(self, identity: Mapping[str, Any] | None, make: Callable[[], Columns]) -> Columns:
        """Return the columns of this identity, making and keeping them first where they are not there.

        A file is written whole or not at all, so a killed evaluation goes on after the last part that it finished. An
        identity of None is nobody's: its columns are made every time.
        """
        if self.folder is None or identity is None:
            return make()
        path = self.folder / f"{content_hash(identity)}.json"
        if path.exists():
            return _read(path)
        columns = make()
        self._write(path, identity, columns)
        return columns

    def _write(self, path: Path, identity: Mapping[str, Any], columns: Columns) -> None:
        plain = {name: [None if isnan(one) else one for one in column] for name, column in columns.items()}
        own = path.with_name(f"{path.stem}.{os.getpid()}")  # two processes may make the same columns at a time
        write_json(own, {"identity": identity, "columns": plain})
        own.replace(path)


def _refuse_unwritable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"the cache's folder {folder} cannot be written: {error.strerror}.",
            "what is measured is kept there part by part, so that a killed evaluation goes on.",
            "name another folder with --cache, or keep nothing with --cache none.",
        ) from None


def _read(path: Path) -> Columns:
    try:
        columns = json.loads(path.read_text(encoding="utf-8"))["columns"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} is no file of this program's cache.",
            "it was written whole; something else has changed it since.",
            "delete it, or evaluate with --cache none.",
        ) from error
    return {name: [nan if one is None else one for one in column] for name, column in columns.items()}


def content_hash(value: Any) -> str:
    """Return the SHA-256 of a value that JSON can hold; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cache_folder(name: str) -> Path | None:
    """Return the folder that the setting `cache` means; None where nothing is to be kept."""
    if name == "none":
        return None
    if name != "auto":
        return Path(name).expanduser()
    if named := os.environ.get("LORAPRUNE_CACHE"):
        return Path(named).expanduser()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "loraprune"


def checkpoint_identity(name: str, commit: str | None) -> str | None:
    """Return the SHA-256 over a local checkpoint's files, or a hub model's name and commit; None without a commit."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{commit}" if commit else None
    return _files_hash(sorted(one for one in folder.iterdir() if one.suffix in CONTENT))


def program_identity() -> dict[str, str]:
    """Return what computes the numbers: versions, and this package's own source, which may change within one."""
    versions = {name: version(name) for name in COUNTED_BY}
    return {**versions, "source": _files_hash(sorted(Path(__file__).parent.glob("*.py")))}


def _files_hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
