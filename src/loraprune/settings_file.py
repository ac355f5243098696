"""Settings file: settings from the plain values of a TOML file.

Reads    a TOML file, or the values of one
Gives    read_settings, settings_from
Source   -
Symbols  -
"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraprune.errors import UserError, nearest
from loraprune.settings import DECLARED, Settings


def read_settings(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file of settings; raise UserError where it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"the settings file {path} cannot be read: {error.strerror}.", "--config names it.", "correct --config."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}.", "settings files are TOML.", "mend that line.") from None


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Return checked settings from plain values; lists become tuples. Raises UserError for what is no setting."""
    _refuse_unknown(values)
    return Settings(**{name: DECLARED[name].coerce(value) for name, value in values.items()})


def _refuse_unknown(names: Iterable[str]) -> None:
    """Raise UserError for the first name that is no setting, offering the nearest one."""
    for name in names:
        if name in DECLARED:
            continue
        close = nearest(name.replace("-", "_").lstrip("_"), DECLARED)
        raise UserError(
            f"there is no setting {name}.",
            "a misspelt setting would be ignored, and the run would not be the one you asked for.",
            f"did you mean {close}?" if close else "loraprune unlearn --help lists all settings.",
        )
