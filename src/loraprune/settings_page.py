"""Settings page: docs/settings.md, written from the settings themselves.

Reads    what is declared of each setting
Gives    page; `python -m loraprune.settings_page > docs/settings.md`
Source   -
Symbols  -
"""

import itertools
from collections.abc import Iterable

from loraprune.setting import Setting
from loraprune.settings import DECLARED

INTRODUCTION = """# Settings

Every setting of a run, by section. On the command line a setting is its flag; in a file given by `--config` it is its
name, and flags override the file. `loraprune COMMAND --help` lists those that a command takes. A setting that does not
exist is refused, and so is a value out of range. A list is written with commas, or its flag is repeated.

This page is generated: `python -m loraprune.settings_page > docs/settings.md`.
"""
HEADING = "| setting | flag | default | range | effect |\n|---|---|---|---|---|"


def page() -> str:
    """Return the page as Markdown: one table per section."""
    sections = itertools.groupby(DECLARED.values(), lambda one: one.section)
    return "\n".join([INTRODUCTION, *(_table(section, settings) for section, settings in sections)])


def _table(section: str, settings: Iterable[Setting]) -> str:
    return "\n".join([f"## {section}", "", HEADING, *map(_row, settings), ""])


def _row(one: Setting) -> str:
    cells = (f"`{one.name}`", _flag(one), f"`{one.default_text}`", one.allowed_text, one.text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flag(one: Setting) -> str:
    if one.name == "model":
        return "`MODEL`, the first word"
    return f"`{one.flag}`, `--no-{one.flag[2:]}`" if one.kind is bool else f"`{one.flag}`"


if __name__ == "__main__":
    print(page(), end="")
