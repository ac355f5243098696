"""Setting: what is declared of one setting, what it may be, and how its values are read and written.

Reads    a field of Settings
Gives    setting, which declares one; Setting; flag, value_text
Source   -
Symbols  -
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from loraprune.errors import UserError
from loraprune.ranges import Range

KIND_WORDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list of names",
    dict: "pairs role=column",
}
_ACCEPTED: dict[type, tuple[type, ...]] = {str: (str,), bool: (bool,), int: (int,), float: (int, float)}


def setting(default: Any, section: str, text: str, *, allowed: Range | tuple[str | int, ...] | None = None) -> Any:
    """Declare one setting; `text` is one full sentence that states its effect.

    Where the annotation is a Literal, its words are what is allowed.
    """
    metadata = {"section": section, "text": text, "allowed": allowed}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One setting, as it is declared.

    `kind` is what it holds, unset left aside: bool, int, float, str, tuple (of str) or dict (str to str).
    """

    name: str
    kind: type
    default: Any
    section: str
    text: str
    allowed: Range | tuple[str | int, ...] | None

    @classmethod
    def of(cls, one: "dataclasses.Field[Any]") -> "Setting":
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        words = get_args(one.type) if get_origin(one.type) is Literal else None
        return cls(one.name, _kind(one.type), default, **{**one.metadata, "allowed": words or one.metadata["allowed"]})

    @property
    def flag(self) -> str:
        return flag(self.name)

    @property
    def allowed_words(self) -> tuple[str, ...]:
        """Return the words or numbers it may be, as they are typed; empty where it is no choice of a few."""
        return tuple(map(str, self.allowed)) if isinstance(self.allowed, tuple) else ()

    @property
    def allowed_text(self) -> str:
        """Return in words what it may be, such as "a number in (0, 1)"."""
        if self.allowed_words:
            return f"one of {', '.join(self.allowed_words)}"
        kind = KIND_WORDS[self.kind]
        return f"{kind} {_inside(self.allowed)}" if isinstance(self.allowed, Range) else kind

    @property
    def default_text(self) -> str:
        """Return the default as it is typed on the command line; "unset" where there is none."""
        return value_text(self.default)

    def check(self, value: Any) -> None:
        """Raise UserError for a value that is not allowed; of what kind it is, `coerce` looks at."""
        if self.allowed is None or (value is None and self.default is None):
            return
        known = isinstance(self.allowed, tuple) and value in self.allowed
        inside = isinstance(self.allowed, Range) and isinstance(value, int | float) and self.allowed.holds(value)
        if not known and not inside:
            raise self.wrong(value)

    def coerce(self, value: Any) -> Any:
        """Return a plain value (of a TOML file, say) as the setting holds it; raise UserError for another kind."""
        if value is None and self.default is None:
            return None
        if value is None or not _fits(self.kind, value):
            raise self.wrong(value)
        return float(value) if self.kind is float else tuple(value) if self.kind is tuple else value

    def wrong(self, value: Any) -> UserError:
        """Return the error for a value that it cannot take; the caller raises it."""
        default = self.default_text
        return UserError(
            f"{self.name} is {value!r}; it must be {self.allowed_text}.",
            self.text,
            f"set {self.flag} to {self.allowed_text}{'' if default == 'unset' else f' (default {default})'}.",
        )


def flag(name: str) -> str:
    """Return a setting's name as it is typed on the command line."""
    return "--" + name.replace("_", "-")


def value_text(value: Any) -> str:
    """Return a setting's value as it is typed on the command line, line breaks as \\n."""
    if value is None or value == "":
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | dict):
        return ",".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", "\\n")


def _kind(annotation: Any) -> type:
    if get_origin(annotation) is Literal:
        return str
    if get_origin(annotation) in (tuple, dict):
        return get_origin(annotation)
    return next(kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None))


def _inside(allowed: Range) -> str:
    return str(allowed) if math.isinf(allowed.high) else f"in {allowed}"


def _fits(kind: type, value: Any) -> bool:
    if kind is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if kind is dict:
        return isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values())
    return isinstance(value, _ACCEPTED[kind]) and isinstance(value, bool) == (kind is bool)
